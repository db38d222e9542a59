/* Where a cell came from: its formula, the terms with the largest share, the rest, the total.

   const origin = terms(app); root.append(origin.root); origin.show(await app.api.cell(name, index))
   Terms that are cells themselves lead on. */

import { el } from "./dom.js";
import { brief } from "./numbers.js";

export function terms(app) {
  const { t } = app;
  const root = el("section", { class: "panel terms", "aria-label": t("cellOrigin"), hidden: true });
  return {
    root,
    hide() { root.hidden = true; },
    show(cell) {
      root.hidden = false;
      const most = Math.max(...cell.terms.map((term) => Math.abs(term.value ?? 0)), 1e-30);
      root.replaceChildren(
        el("h2", null, t("cellOrigin")),
        el("p", { class: "formula" }, el("code", null, `${cell.name}[${cell.index.join(", ")}]`),
          " = ", el("code", null, cell.formula)),
        el("div", { class: "scroll-x" }, el("table", { class: "list" },
          el("thead", null, el("tr", null, ["what", "factors", "value"].map((key) =>
            el("th", { scope: "col", class: key === "value" && "number" }, t(`terms.${key}`))),
          el("td"))),
          el("tbody", null, cell.terms.map((term) => row(app, term, most))),
          el("tfoot", null, rest(app, cell), total(app, cell)))),
        difference(app, cell));
    },
  };
}

function row(app, term, most) {
  const share = Math.abs(term.value ?? 0) / most;
  return el("tr", { "data-value": term.value },
    el("th", { scope: "row" }, term.from
      ? el("button", { type: "button", class: "plain link", onclick: () => app.set({
        view: "tensor", tensor: term.from.name, cell: term.from.index }) }, term.label)
      : term.label),
    el("td", { class: "factors" }, term.factors.map((x) => brief(x)).join(" × ")),
    el("td", { class: "number" }, brief(term.value)),
    el("td", { class: "bar", "aria-hidden": "true" },
      el("i", { class: term.value < 0 ? "less" : "more", style: `--share:${share}` })));
}

function rest(app, { rest: { count, value } }) {
  if (!count) return null;
  return el("tr", { "data-rest": value }, el("th", { scope: "row" },
    app.t("terms.rest", { n: count })), el("td"), el("td", { class: "number" }, brief(value)));
}

function total(app, cell) {
  const line = (key, value, name) => el("tr", { class: "sum", [`data-${name}`]: value },
    el("th", { scope: "row" }, app.t(key)), el("td"),
    el("td", { class: "number" }, brief(value, 6)));
  return [line("terms.total", cell.total, "total"), line("terms.value_", cell.value, "cell")];
}

function difference(app, cell) {
  if (cell.difference === null || cell.difference === undefined) return null;
  return el("p", { class: "quiet" }, app.t("terms.off", { difference: brief(cell.difference) }));
}
