/* Lines from one token to those it attends to: a thicker line is a larger share.

   root.append(attentionLines(app, {tokens, position, shares})). SVG; the list is text. */

import { el, svg } from "./dom.js";
import { percent } from "./numbers.js";
import { plain, visible } from "./tokens.js";

const MOST = 16; // tokens drawn: those with the largest shares, in the order of the text
const STEP = 26;

export function attentionLines(app, { tokens, position, shares }) {
  const { t } = app;
  const order = Array.from(shares.slice(0, position + 1), (share, s) => ({ s, share }));
  const drawn = order.sort((a, b) => b.share - a.share).slice(0, MOST).sort((a, b) => a.s - b.s);
  const height = Math.max(1, drawn.length) * STEP;
  const most = Math.max(...drawn.map(({ share }) => share), 1e-9);
  const curves = drawn.map(({ share }, i) => {
    const y = (i + 0.5) * STEP;
    return svg("path", { d: `M0 ${height / 2} C60 ${height / 2}, 60 ${y}, 120 ${y}`,
      "stroke-width": Math.max(0.4, (10 * share) / most), opacity: 0.25 + (0.75 * share) / most });
  });
  const list = drawn.map(({ s, share }) => el("li", { "data-index": s, "data-value": share },
    el("button", { type: "button", class: "plain", onclick: () =>
      app.set({ position: s }, { replace: true }) }, el("span", { class: "at" }, s), " ",
    el("span", { class: "piece" }, visible(tokens[s]))), el("span", { class: "number" },
      percent(share))));
  return el("figure", { class: "lines" },
    el("figcaption", null, t("lines", { position, token: plain(tokens[position]) })),
    el("div", { class: "lines-body" },
      el("span", { class: "piece asking" }, visible(tokens[position])),
      svg("svg", { viewBox: `0 0 120 ${height}`, width: 120, height, "aria-hidden": "true" }, curves),
      el("ol", { style: `--step:${STEP}px` }, list)),
    order.length > MOST && el("p", { class: "quiet" }, t("lines.more",
      { n: order.length - MOST })));
}
