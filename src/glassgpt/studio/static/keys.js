/* The page by keyboard, and the list of keys ("?"). Single letters do nothing while people type. */

import { el } from "./parts/dom.js";

/** key -> what it does; its text is `key.NAME` in words/. */
const KEYS = [
  ["/", "text", (app, event) => {
    event.preventDefault();
    document.querySelector("#prompt textarea").focus();
  }],
  ["]", "nextView", (app) => turn(app, 1)],
  ["[", "lastView", (app) => turn(app, -1)],
  ["j", "layerUp", (app) => app.set({ layer: step(app.layer, 1, app.model.config.n_layer) })],
  ["k", "layerDown", (app) => app.set({ layer: step(app.layer, -1, app.model.config.n_layer) })],
  ["l", "headUp", (app) => app.set({ head: step(app.head, 1, app.model.config.n_head) })],
  ["h", "headDown", (app) => app.set({ head: step(app.head, -1, app.model.config.n_head) })],
  ["n", "positionUp", (app) => move(app, 1)],
  ["p", "positionDown", (app) => move(app, -1)],
  ["d", "theme", () => document.querySelector("#top .tools > button:nth-last-child(2)").click()],
  ["?", "help", (app) => openHelp(app)],
];

const step = (n, by, size) => (n + by + size) % size;

function move(app, by) {
  if (!app.trace) return;
  app.set({ position: step(app.position, by, app.trace.tokens.length) }, { replace: true });
}

function turn(app, by) {
  const keys = app.views.map((view) => view.key);
  app.set({ view: keys[step(keys.indexOf(app.state.view), by, keys.length)] });
}

let asleep = false; // people can switch off single letters in the list of keys

export function watchKeys(app) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.closest("input, textarea, select, dialog, [contenteditable]")) return;
    const known = KEYS.find(([key]) => key === event.key);
    if (known && (!asleep || event.key === "?")) known[2](app, event);
  });
}

/** A dialog with every key; those for pictures come last. */
export function openHelp(app) {
  const { t } = app;
  const row = (keys, text) => el("tr", null, el("th", { scope: "row" },
    keys.map((key) => el("kbd", null, key))), el("td", null, text));
  const awake = el("input", { type: "checkbox", id: "keys-on", checked: !asleep,
    onchange: () => { asleep = !awake.checked; } });
  const sheet = el("dialog", { class: "help", "aria-labelledby": "help-title" },
    el("form", { method: "dialog" }, el("h2", { id: "help-title" }, t("help")),
      el("table", null, el("tbody", null,
        KEYS.map(([key, name]) => row([key], t(`key.${name}`))),
        row(["←", "→", "↑", "↓"], t("key.cells")), row(["Enter"], t("key.pick")),
        row(["+", "−", "0"], t("key.zoom")), row(["Esc"], t("key.close")))),
      el("p", null, awake, " ", el("label", { for: "keys-on" }, t("key.on"))),
      el("p", { class: "quiet" }, t("help.more")),
      el("button", { class: "main", value: "close" }, t("close"))));
  sheet.addEventListener("close", () => sheet.remove());
  document.getElementById("main").append(sheet);
  sheet.showModal();
}
