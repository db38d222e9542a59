/* Part of the lens view: the parts of the model whose sum is a logit, as bars and as a map.

   const panel = attributionPanel(app); await panel.update(candidates, signal) */

import { bars } from "../parts/bars.js";
import { choice, el, field } from "../parts/dom.js";
import { brief } from "../parts/numbers.js";
import { plain } from "../parts/tokens.js";

const LARGEST = 12; // parts with a bar of their own

export function attributionPanel(app) {
  const { t } = app;
  const tools = el("div", { class: "controls" });
  const list = bars(app, { label: t("attribution"), heading: [t("part"), t("value")] });
  const map = el("div", { class: "scroll", tabindex: "0", role: "group",
    "aria-label": t("allParts") });
  const root = el("section", { class: "panel attribution", "aria-label": t("attribution") },
    el("h2", null, t("attribution")), el("p", { class: "aside" }, t("attributionNote")), tools,
    list.root, el("h3", null, t("allParts")), map,
    el("p", { class: "aside" }, el("i", { class: "swatch more" }), ` ${t("up")} · `,
      el("i", { class: "swatch less" }), ` ${t("down")}`));

  return {
    root,
    /** `candidates`: the likeliest tokens here, best first; the first one is shown at the start. */
    async update(candidates, signal) {
      const { lensToken, lensAgainst } = app.state;
      const known = candidates.some((token) => token.id === lensToken);
      const token = lensToken ?? candidates[0].id;
      const against = lensAgainst === token ? null : lensAgainst;
      const answer = await app.api.ofTrace(`attribution?position=${app.position}&token=${token}`
        + (against === null ? "" : `&against=${against}`), signal);
      const more = known || lensToken === null ? [] : [await app.api.get(`token/${token}`, signal)];
      showTools(app, tools, [...candidates, ...more], token, against);
      showBars(app, list, answer, against !== null);
      map.replaceChildren(partMap(app, answer.parts));
    },
  };
}

function showTools(app, root, tokens, token, against) {
  const { t } = app;
  const names = tokens.map((one) => [String(one.id), `${plain(one)} (${one.id})`]);
  const others = names.filter(([id]) => id !== String(token));
  root.replaceChildren(
    field(t("of"), choice(names, String(token), (id) => app.set({ lensToken: Number(id) }))),
    field(t("against"), choice([["", t("nobody")], ...others], String(against ?? ""),
      (id) => app.set({ lensAgainst: id === "" ? null : Number(id) }))));
}

/** "3.h2" -> "block 3: head 2". */
function partName(app, part) {
  const inside = /^(\d+)[. ](?:h(\d+)|mlp|attn bias|edited)$/.exec(part);
  if (!inside) return app.t(`part.${part}`);
  const [, n, h] = inside;
  return app.t(h !== undefined ? "part.head" : `part.${part.slice(n.length + 1)}`, { n, h });
}

function showBars(app, list, { logit, parts }, difference) {
  const { t } = app;
  const sorted = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const rest = sorted.slice(LARGEST);
  const row = ({ part, value }) => ({ label: partName(app, part), value, text: brief(value),
    data: { name: "attribution", index: part } });
  const rows = sorted.slice(0, LARGEST).map(row);
  if (rest.length) {
    const value = rest.reduce((sum, part) => sum + part.value, 0);
    rows.push({ label: t("rest", { n: rest.length }), value, text: brief(value), tone: "rest",
      data: { name: "attribution", index: "rest" } });
  }
  rows.push({ label: t(difference ? "totalAgainst" : "total"), value: logit, text: brief(logit),
    tone: "total", data: { name: "attribution", index: "total" } });
  list.show(rows);
}

/** Blocks x (heads, MLP), each cell coloured by what it adds. */
function partMap(app, parts) {
  const { t, model } = app;
  const { n_layer: layers, n_head: heads } = model.config;
  const values = new Map(parts.map(({ part, value }) => [part, value]));
  const largest = Math.max(...parts.map(({ value }) => Math.abs(value)), 1e-30);
  const columns = [...Array.from({ length: heads }, (_, h) => `h${h}`), "mlp"];
  const cell = (layer, column) => {
    const value = values.get(`${layer}.${column}`);
    return el("td", { "data-name": "part", "data-index": `${layer}.${column}`,
      "data-value": value, class: value < 0 ? "less" : "more",
      style: `--share:${(Math.abs(value ?? 0) / largest).toFixed(3)}`,
      title: `${partName(app, `${layer}.${column}`)}: ${brief(value)}` }, brief(value, 2));
  };
  return el("table", { class: "parts-map" }, el("caption", { class: "unseen" }, t("allParts")),
    el("thead", null, el("tr", null, el("th", { scope: "col" }, t("block")), columns.map((name) =>
      el("th", { scope: "col" }, name === "mlp" ? "MLP" : name)))),
    el("tbody", null, Array.from({ length: layers }, (_, layer) => el("tr", null,
      el("th", { scope: "row" }, layer), columns.map((column) => cell(layer, column))))));
}
