/* Picture or table? Two buttons beside every picture; the choice holds for all pictures.

   const choice = asTable(app, label); above.append(choice.root); choice.update() */

import { el, toggle } from "./dom.js";

export function asTable(app, label) {
  const button = (key, table) => toggle(app.t(key), false,
    () => app.set({ table }, { replace: true }));
  const [picture, table] = [button("asPicture", false), button("asTable", true)];
  return {
    root: el("div", { class: "segments", role: "group", "aria-label": label }, picture, table),
    update() {
      picture.setAttribute("aria-pressed", String(!app.state.table));
      table.setAttribute("aria-pressed", String(app.state.table));
    },
  };
}
