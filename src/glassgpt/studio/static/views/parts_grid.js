/* Part of the experiments view: every block, head and MLP as a switch (blocks x parts).

   const grid = partsGrid(app); grid.show({label, parts: ["3.h2"], toggle: (part) => ..., takes}) */

import { el, toggle as switchButton } from "../parts/dom.js";
import { roam } from "../parts/roam.js";

export function partsGrid(app) {
  const { t, model } = app;
  const { n_layer: layers, n_head: heads } = model.config;
  const columns = ["", "attn", ...Array.from({ length: heads }, (_, h) => `h${h}`), "mlp"];
  const title = el("h2");
  const table = el("table", { class: "switches" });
  const keys = roam(table);
  const root = el("section", { class: "panel" }, title, el("div", { class: "scroll" }, table));

  function cell(layer, column, { parts, toggle }) {
    const part = column ? `${layer}.${column}` : String(layer);
    const within = isWithin(part, parts);
    return el("td", null, switchButton(column ? shortName(app, column) : String(layer),
      parts.includes(part), () => toggle(part), { "data-part": part,
        class: within ? "within" : null,
        "aria-label": partName(app, layer, column) }));
  }

  return {
    root,
    show(chosen) {
      title.textContent = chosen.label;
      root.setAttribute("aria-label", chosen.label);
      table.classList.toggle("take", Boolean(chosen.takes));
      keys.redraw(() => table.replaceChildren(
        el("caption", { class: "unseen" }, chosen.label),
        el("thead", null, el("tr", null, columns.map((column) => el("th", { scope: "col" },
          t(column.startsWith("h") ? "column.head" : `column.${column || "block"}`,
            { h: column.slice(1) }))))),
        el("tbody", null, Array.from({ length: layers }, (_, layer) => el("tr", null,
          columns.map((column) => cell(layer, column, chosen)))))));
    },
  };
}

/** Whether this part lies in a larger chosen one: a head in its attention, or that in its block. */
function isWithin(part, parts) {
  const [layer, column] = part.split(".");
  if (!column) return false;
  return parts.includes(layer) || (column.startsWith("h") && parts.includes(`${layer}.attn`));
}

const shortName = (app, column) => (column.startsWith("h") ? column.slice(1)
  : app.t(`column.${column}`));

function partName(app, layer, column) {
  const { t } = app;
  if (!column) return t("part.block", { n: layer });
  if (column.startsWith("h")) return t("part.head", { n: layer, h: column.slice(1) });
  return t(`part.${column}`, { n: layer });
}
