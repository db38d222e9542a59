/* What is around every view: brand, languages, theme, the list of views, the prompt.

   const shell = makeShell(app); shell.update(); shell.heading(view)
   Built anew when the language changes. */

import { exportHtml, exportPng } from "./export.js";
import { LANGUAGES } from "./i18n.js";
import { openHelp } from "./keys.js";
import { choice, el, field } from "./parts/dom.js";
import { about, count } from "./parts/numbers.js";
import { explain } from "./parts/tip.js";
import { tokenStrip } from "./parts/tokens.js";

const THEMES = { "": "◐", light: "☀", dark: "☾" };

export function makeShell(app) {
  document.getElementById("skip").textContent = app.t("skip");
  header(app);
  const links = navigation(app);
  const prompt = promptBox(app);
  return {
    update() {
      for (const [key, link] of links) {
        if (key === app.state.view) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
        link.href = `#${hashFor(app, key)}`;
      }
      links.get(app.state.view)?.scrollIntoView?.({ block: "nearest", inline: "nearest" });
      prompt.update();
    },
    heading(view) {
      return el("header", { class: "heading" }, el("h1", { id: "title" }, view.title[app.lang]),
        el("p", { class: "intro" }, view.intro[app.lang]));
    },
  };
}

/** The present hash of the URL, with another view. */
function hashFor(app, key) {
  const words = new URLSearchParams(location.hash.replace(/^#/, ""));
  words.set("view", key);
  return words.toString();
}

function header(app) {
  const { t, model, state } = app;
  const next = { "": "light", light: "dark", dark: "" };
  const theme = el("button", { type: "button", class: "icon", "aria-label": t("theme"),
    onclick: () => {
      app.set({ theme: next[app.state.theme] ?? "" }, { replace: true });
      theme.textContent = THEMES[app.state.theme];
      app.announce(t(`theme.${app.state.theme || "auto"}`));
    } }, THEMES[state.theme] ?? THEMES[""]);
  explain(theme, () => `${t("theme")}: ${t(`theme.${app.state.theme || "auto"}`)}`);
  const other = app.lang === "en" ? "zh" : "en";
  const language = el("button", { type: "button", class: "icon", lang: other,
    onclick: () => app.set({ lang: other }, { replace: true }) }, LANGUAGES[other]);
  const help = el("button", { type: "button", class: "icon", "aria-label": t("help"),
    onclick: () => openHelp(app) }, "?");
  explain(help, () => t("help"));
  document.getElementById("top").replaceChildren(
    el("a", { class: "brand", href: "#" }, el("img", { src: "icon.svg", alt: "", width: 26,
      height: 26 }), el("span", null, "GlassGPT")),
    el("p", { class: "model" }, el("b", null, model.name), " ",
      el("span", null, t("parameters", { n: about(model.parameters) }), " · ",
        t("layersHeads", { layers: model.config.n_layer, heads: model.config.n_head }))),
    el("div", { class: "tools" }, saveMenu(app), language, theme, help));
}

function saveMenu(app) {
  const { t } = app;
  const act = (save) => () => {
    menu.open = false;
    return save(app).catch((error) => app.alerts.say(error.message, "export"));
  };
  const menu = el("details", { class: "menu" },
    el("summary", { class: "icon" }, t("save")),
    el("div", { class: "sheet" },
      el("button", { type: "button", onclick: act(exportHtml) }, t("save.html")),
      el("button", { type: "button", onclick: act(exportPng) }, t("save.png"))));
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    menu.firstChild.focus();
  });
  menu.addEventListener("focusout", (event) => {
    if (!menu.contains(event.relatedTarget)) menu.open = false;
  });
  return menu;
}

function navigation(app) {
  const nav = document.getElementById("views");
  nav.setAttribute("aria-label", app.t("views"));
  const links = new Map(app.views.map((view) => [view.key, el("a", { href: "#",
    onclick: (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return; // opens a new tab
      event.preventDefault();
      app.set({ view: view.key });
    } }, view.title[app.lang])]));
  nav.replaceChildren(el("ol", null, [...links.values()].map((link) => el("li", null, link))));
  return links;
}

// -- the prompt ----------------------------------------------------------------------------------

function promptBox(app) {
  const { t, model } = app;
  const text = el("textarea", { rows: 2, spellcheck: "false", autocomplete: "off",
    oninput: () => app.set({ text: text.value, tokens: null, position: null, cell: null },
      { replace: true }) });
  const strip = tokenStrip(app, { label: t("promptTokens"),
    onpick: (at) => app.set({ position: at }, { replace: true }) });
  strip.root.id = "prompt-tokens";
  const size = el("p", { class: "size" });
  const changes = el("p", { class: "changes", hidden: true });
  const section = document.getElementById("prompt");
  section.setAttribute("aria-label", t("prompt"));
  section.replaceChildren(
    el("div", { class: "entry" }, field(t("prompt"), text, { class: "field grow" }), choices(app)),
    strip.root, el("div", { class: "under" }, size, changes));
  let drawn = null;
  return {
    update() {
      const { state, trace } = app;
      if (document.activeElement !== text) {
        text.value = state.tokens && trace ? trace.tokens.map((token) => token.text).join("")
          : state.text;
      }
      if (trace && trace !== drawn) strip.show(trace.tokens, app.position);
      else if (trace) strip.select(app.position);
      drawn = trace;
      size.textContent = trace ? t("tokensOf", { n: count(trace.tokens.length),
        most: count(model.context_length), position: app.position }) : "";
      showChanges(app, changes);
    },
  };
}

/** Lets people choose a model and a moment of its training, if there is more than one. */
function choices(app) {
  const { t, model, state } = app;
  const boxes = [];
  if (model.models.length > 1) {
    boxes.push(field(t("model"), choice(model.models.map((m) => [m.key, m.name]), state.model,
      (key) => app.set({ model: key }))));
  }
  if (model.snapshots.length) {
    const steps = [["", t("best")], ...model.snapshots.map((s) => [String(s), t("step", { n: s })])];
    boxes.push(field(t("snapshot"), choice(steps, String(state.snapshot ?? ""),
      (step) => app.set({ snapshot: step === "" ? null : Number(step) }))));
  }
  return boxes;
}

/** What is changed: parts that are off, activations that are patched. One button undoes it all. */
function showChanges(app, root) {
  const { state, t } = app;
  const said = [
    state.off.length && t("partsOff", { parts: state.off.join(", ") }),
    state.patch && t("patched", { parts: [state.patch.parts ?? []].flat().join(", ") }),
  ].filter(Boolean);
  root.hidden = !said.length;
  root.replaceChildren(...said.map((words) => el("span", { class: "badge" }, words)),
    el("button", { type: "button", class: "quiet", onclick: () =>
      app.set({ off: [], patch: null }) }, t("whole")));
}
