/* The table view of a picture: the cells around the cursor, each with its exact value in data-value. */

import { el } from "./dom.js";
import { brief } from "./numbers.js";

const MOST = 64; // rows and columns of a table

/** Nodes: a note if only a part is shown, and the table. Clicks call `pick(r, c)`. */
export function tableOf(app, shown, view, cursor, isMasked, pick) {
  const { t } = app;
  const [from, rows] = around(cursor[0], view.r, view.rows);
  const [first, columns] = around(cursor[1], view.c, view.columns);
  const inner = Array.from({ length: columns }, (_, i) => first + i);
  const head = el("tr", null, el("td"), inner.map((c) =>
    el("th", { scope: "col" }, shown.columnLabel(c))));
  const body = Array.from({ length: rows }, (_, i) => {
    const r = from + i;
    return el("tr", null, el("th", { scope: "row" }, shown.rowLabel(r)), inner.map((c) => {
      const value = shown.data[r * shown.shape[1] + c];
      const masked = isMasked(r, c);
      return el("td", { "data-name": shown.name, "data-index": shown.index(r, c).join(","),
        "data-value": value, "data-masked": masked, class: r === cursor[0] && c === cursor[1]
          && "now" }, masked ? t("masked") : brief(value));
    }));
  });
  const table = el("table", { class: "values", onclick: (event) => {
    const cell = event.target.closest("td[data-index]");
    if (!cell) return;
    const row = cell.parentNode;
    pick(from + row.sectionRowIndex, first + cell.cellIndex - 1);
  } }, el("thead", null, head), el("tbody", null, body));
  const all = rows === shown.shape[0] && columns === shown.shape[1];
  return all ? [table] : [el("p", { class: "quiet" }, t("windowNote", { rows, columns })), table];
}

/** The window [from, size] of at most MOST cells around `at`, inside the part in view. */
function around(at, from, size) {
  const n = Math.min(MOST, size);
  const start = Math.max(from, Math.min(from + size - n, at - (n >> 1)));
  return [start, n];
}
