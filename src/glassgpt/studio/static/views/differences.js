/* Part of the experiments view: two passes compared: the next token, and the loss of every token.

   const panel = differences(app); panel.update({a, b, names, answer})   answer: GET /api/compare */

import { el } from "../parts/dom.js";
import { brief, percent } from "../parts/numbers.js";
import { visible } from "../parts/tokens.js";

export function differences(app) {
  const { t } = app;
  const facts = el("p", { class: "facts big" });
  const next = el("table", { class: "against" });
  const losses = el("div", { class: "loss-changes" });
  const root = el("section", { class: "panel", "aria-label": t("result") },
    el("h2", null, t("result")), facts, el("h3", null, t("next")),
    el("div", { class: "scroll tall", tabindex: "0", role: "group", "aria-label": t("next") },
      next),
    losses);

  return {
    root,
    async update({ a, b, names, answer }) {
      const [lossA, lossB] = await Promise.all([a.get("loss"), b.get("loss")]);
      const same = a.tokens.map(({ id }) => id).join() === b.tokens.map(({ id }) => id).join();
      showFacts(app, facts, answer, { a: lossA.mean, b: lossB.mean, same });
      next.replaceChildren(...nextRows(app, answer.next.tokens, names));
      losses.replaceChildren(...(same ? lossRows(app, b.tokens, answer.loss) : []));
    },
  };
}

function showFacts(app, root, answer, { a: meanA, b: meanB, same }) {
  const { t } = app;
  const data = (index, value) => ({ "data-name": "compare", "data-index": index,
    "data-value": value });
  root.replaceChildren(
    el("b", data("kl", answer.next.kl), t("kl", { n: brief(answer.next.kl, 3) })),
    ...(meanA === null || meanB === null ? [] : [
      el("span", data("loss.a", meanA), t("lossFrom", { n: brief(meanA) })),
      el("span", data("loss.b", meanB), t("lossTo", { n: brief(meanB) })),
      ...(same ? [el("span", null, t("lossBy", { n: signed(meanB - meanA) }))] : [])]));
}

const signed = (n) => (n > 0 ? "+" : "") + brief(n, 3);

function nextRows(app, tokens, names) {
  const { t } = app;
  const most = Math.max(...tokens.map((token) => Math.max(token.a, token.b)), 1e-30);
  const row = (token) => el("tr", { "data-name": "compare", "data-index": token.id,
    "data-a": token.a, "data-b": token.b, "data-value": token.b - token.a },
  el("th", { scope: "row" }, visible(token)),
  el("td", { class: "number" }, percent(token.a)),
  el("td", { class: "double", "aria-hidden": "true" },
    el("i", { class: "a", style: `--share:${token.a / most}` }),
    el("i", { class: "b", style: `--share:${token.b / most}` })),
  el("td", { class: "number" }, percent(token.b)));
  return [
    el("caption", { class: "unseen" }, t("next")),
    el("thead", null, el("tr", null, el("th", { scope: "col" }, t("token")),
      el("th", { scope: "col", class: "number" }, el("i", { class: "swatch a" }), " ", names[0]),
      el("th", { scope: "col" }, el("span", { class: "unseen" }, t("bar"))),
      el("th", { scope: "col", class: "number" }, el("i", { class: "swatch b" }), " ", names[1]))),
    el("tbody", null, tokens.map(row)),
  ];
}

/** Every token, coloured by how its loss changed: warm is worse, cool is better. */
function lossRows(app, tokens, { a, b }) {
  const { t } = app;
  const moved = b.map((loss, i) => (loss === null || a[i] === null ? null : loss - a[i]));
  const most = Math.max(1, ...moved.map((one) => Math.abs(one ?? 0)));
  const item = (token, i) => el("li", { class: moved[i] === null ? null
    : moved[i] < 0 ? "better" : "worse", style: `--share:${Math.abs(moved[i] ?? 0) / most}`,
  "data-name": "lossChange", "data-index": i, "data-a": a[i], "data-b": b[i] },
  el("b", null, visible(token)),
  el("small", null, moved[i] === null ? "–" : signed(moved[i])));
  return [el("h3", null, t("lossMoved")),
    el("p", { class: "aside" }, el("i", { class: "swatch more" }), ` ${t("worse")} · `,
      el("i", { class: "swatch less" }), ` ${t("better")}`),
    el("ol", { class: "chips" }, tokens.map(item))];
}
