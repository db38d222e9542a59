/* Lines of model.py, some of them highlighted. Comments and keywords have colours. */

import { el } from "./dom.js";

const AROUND = 3; // lines shown before and after the highlighted ones
const WORDS = new RegExp(String.raw`(#.*$)|("""|"[^"]*")|\b(def|class|return|if|else|elif|for|in|is`
  + String.raw`|not|None|True|False|and|or|self|lambda|with|import|from)\b`, "g");

export function code(app, source, [first, last]) {
  const lines = source.text.split("\n");
  const from = Math.max(1, first - AROUND);
  const to = Math.min(lines.length, last + AROUND);
  const indent = Math.min(...lines.slice(from - 1, to).filter((line) => line.trim())
    .map((line) => line.search(/\S/)));
  const rows = [];
  for (let n = from; n <= to; n++) {
    rows.push(el("span", { class: n >= first && n <= last ? "line lit" : "line", "data-line": n },
      el("span", { class: "line-number", "aria-hidden": "true" }, n),
      coloured(lines[n - 1].slice(indent)), "\n"));
  }
  const what = `${source.file}, ${first}${last > first ? `–${last}` : ""}`;
  return el("figure", { class: "code" }, el("figcaption", null, what),
    el("pre", { tabindex: "0", role: "region", "aria-label": what }, el("code", null, rows)));
}

function coloured(line) {
  const nodes = [];
  let end = 0;
  for (const match of line.matchAll(WORDS)) {
    nodes.push(line.slice(end, match.index));
    const kind = match[1] ? "comment" : match[2] ? "text" : "word";
    nodes.push(el("span", { class: kind }, match[0]));
    end = match.index + match[0].length;
  }
  return [...nodes, line.slice(end)];
}
