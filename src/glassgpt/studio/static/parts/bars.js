/* A list with a bar for each entry: next tokens, parts of a logit, shares of a sum.

   const list = bars(app, {label, heading}); list.show([{label, value, text, tone, data}])
   It is a table; every row carries its exact number as data-value. */

import { el } from "./dom.js";
import { brief } from "./numbers.js";

/** `heading`: what the rows are, and what the number is. `onpick(row, i)` makes rows buttons. */
export function bars(app, { label, heading, onpick }) {
  const body = el("tbody");
  const root = el("table", { class: "bars" }, el("caption", { class: "unseen" }, label),
    el("colgroup", null, el("col", { class: "what" }), el("col", { class: "amount" }), el("col")),
    el("thead", { class: "unseen" }, el("tr", null, heading.map((text) =>
      el("th", { scope: "col" }, text)), el("th", { scope: "col" }, app.t("bar")))), body);
  /** Rows: `label` (text or nodes), `value`, `text` (shown for it), `tone` ("", "cut", "now"),
      `data` ({name: exact value} for data attributes). Negative values point left. */
  function show(rows, { most } = {}) {
    const largest = most ?? Math.max(...rows.map((row) => Math.abs(row.value ?? 0)), 1e-30);
    const two = rows.some((row) => row.value < 0);
    body.replaceChildren(...rows.map((row, i) => el("tr", {
      class: row.tone, "data-value": row.value,
      ...Object.fromEntries(Object.entries(row.data ?? {}).map(([k, v]) => [`data-${k}`, v])),
    },
    el("th", { scope: "row" }, onpick
      ? el("button", { type: "button", class: "plain", onclick: () => onpick(row, i) }, row.label)
      : row.label),
    el("td", { class: "number" }, row.text ?? brief(row.value)),
    el("td", { class: two ? "bar two" : "bar", "aria-hidden": "true" },
      el("i", { class: row.value < 0 ? "less" : "more",
        style: `--share:${Math.min(1, Math.abs(row.value ?? 0) / largest)}` })))));
  }
  return { root, show };
}
