/* Starts the page: one state, one trace, one view shown at a time.

   A view is a module in views/ (see views/tokens.js for a small one):
     export default {
       key, title: {en, zh}, intro: {en, zh},
       words: {en: {...}, zh: {...}},  // its own texts, for app.t
       state: {name: default},         // its own fields of the state, mirrored in the URL (optional)
       alone: true,                    // works without a trace (optional)
       mount(root, app) { ...; return { update(state, signal) {...}, leave() {...} } },
     };
   `mount` builds the elements, again when the language changes. `update` may be async; it is called
   when the view is shown, and after every change of the state or the trace. A newer call aborts the
   older one's `signal`: hand it to app.api, whose answers then go nowhere. What `update` throws is
   shown as an alert. `leave` (optional) ends timers. */

import { makeAlerts } from "./alerts.js";
import { makeApi } from "./api.js";
import { languageOf, translator } from "./i18n.js";
import { watchKeys } from "./keys.js";
import { close, watchTips } from "./parts/tip.js";
import { makeShell } from "./shell.js";
import { FIELDS, changesTrace, makeStore, traceRequest } from "./state.js";
import { VIEWS } from "./views/index.js";

const PAUSE = 180; // ms after the last key until a text is sent

const fields = Object.assign({ ...FIELDS }, ...VIEWS.map((view) => view.state ?? {}));
const store = makeStore(fields, changed);
const main = document.getElementById("main");
const place = document.getElementById("view");
const alerts = makeAlerts(document.getElementById("alerts"), () => app.t);

/** What every view and part gets. They read `state`, `model` and `trace`, and change with `set`. */
const app = {
  views: VIEWS,
  model: null, // GET /api/model
  trace: null, // the answer of POST /api/trace for the present state
  alerts,
  get state() { return store.state; },
  set: (patch, options) => store.set(patch, options),
  api: makeApi(() => app.t("serverGone")),
  t: translator(languageOf(store.state.lang)),
  get lang() { return languageOf(store.state.lang); },
  /** The choices in the state, limited to what this model and this text have. */
  get layer() { return within(app.state.layer, app.model.config.n_layer); },
  get head() { return within(app.state.head, app.model.config.n_head); },
  get position() {
    const T = app.trace?.tokens.length ?? 1;
    return within(app.state.position ?? T - 1, T);
  },
  /** Tells people who use a screen reader. */
  announce: (text) => { document.getElementById("spoken").textContent = text; },
  /** Computes and shows everything again, for example after the server came back. */
  again: () => compute(),
};

const within = (n, size) => Math.min(Math.max(0, Number.isInteger(n) ? n : 0), size - 1);

// -- views ---------------------------------------------------------------------------------------

let shown = null; // {view, root, update, leave}
let updating = null; // AbortController of the update under way
let shell = null;

function viewOf(key) {
  return VIEWS.find((view) => view.key === key) ?? VIEWS.find((view) => view.key === FIELDS.view);
}

function mount() {
  shown?.leave?.();
  close();
  const view = viewOf(app.state.view);
  const root = document.createElement("div");
  root.className = `view view-${view.key}`;
  const own = Object.create(app, { t: { value: translator(app.lang, view.words) } });
  shown = { view, root, ...view.mount(root, own) };
  place.replaceChildren(shell.heading(view), root);
  place.setAttribute("aria-labelledby", "title");
  document.title = `${view.title[app.lang]} · ${app.model.name} · GlassGPT`;
}

async function update() {
  updating?.abort();
  const { signal } = (updating = new AbortController());
  shell.update();
  checkState();
  if (!app.trace && !shown.view.alone) return;
  place.setAttribute("aria-busy", "true");
  try {
    await shown.update(app.state, signal);
    if (signal.aborted) return;
    alerts.clear("view");
    alerts.clear("server");
    place.dataset.ready = String(Number(place.dataset.ready ?? 0) + 1); // for tests: all is drawn
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    report(error, "view");
  }
  place.setAttribute("aria-busy", "false");
}

function report(error, cause) {
  if (error.name !== "ApiError") console.error(error);
  alerts.say(error.message, error.status === 0 ? "server" : cause);
}

/** A URL may ask for what does not exist: this is said once, and the nearest thing is shown. */
function checkState() {
  const { state, model, t } = app;
  const wrong = (name, n, size) => {
    const fits = n === null || (Number.isInteger(n) && n >= 0 && n < size);
    if (fits) alerts.clear(name);
    else alerts.say(t("notThere", { what: t(name), n, last: size - 1 }), name);
  };
  wrong("layer", state.layer, model.config.n_layer);
  wrong("head", state.head, model.config.n_head);
  if (app.trace) wrong("position", state.position, app.trace.tokens.length);
  if (VIEWS.some((view) => view.key === state.view)) alerts.clear("noView");
  else alerts.say(t("noView", { name: state.view }), "noView");
}

// -- the trace -----------------------------------------------------------------------------------

let tracing = null;
let waiting = 0;

async function compute() {
  tracing?.abort();
  const { signal } = (tracing = new AbortController());
  main.setAttribute("aria-busy", "true");
  try {
    app.trace = await app.api.trace(traceRequest(app.state), { signal });
    alerts.clear("trace");
    alerts.clear("server");
    if (app.trace.note) alerts.say(app.trace.note, "note", "note");
    else alerts.clear("note");
  } catch (error) {
    if (signal.aborted) return;
    report(error, "trace");
  }
  main.setAttribute("aria-busy", "false");
  await update();
}

// -- changes -------------------------------------------------------------------------------------

async function changed(state, names) {
  if (!app.model) return; // the page is still starting
  if (names.includes("theme")) setTheme();
  if (names.includes("lang")) speak();
  if (names.includes("view") || names.includes("lang")) mount();
  if (names.includes("view")) scrollTo({ top: 0 });
  clearTimeout(waiting);
  if (!changesTrace(names)) await update();
  else if (names.includes("text")) waiting = setTimeout(compute, PAUSE);
  else await compute();
}

function speak() {
  app.t = translator(app.lang);
  document.documentElement.lang = app.lang === "zh" ? "zh-Hans" : "en";
  shell = makeShell(app);
}

const system = matchMedia("(prefers-color-scheme: dark)");

function setTheme() {
  const { theme } = app.state;
  const chosen = ["light", "dark"].includes(theme);
  document.documentElement.dataset.theme = chosen ? theme : system.matches ? "dark" : "light";
}

// -- start ---------------------------------------------------------------------------------------

async function start() {
  setTheme();
  try {
    app.model = await app.api.get("model");
  } catch (error) {
    alerts.say(error.message, "server");
    return;
  }
  const short = fields.text.slice(0, app.model.context_length); // fits a tiny model
  if (app.state.text === fields.text) store.state.text = short;
  fields.text = short;
  speak();
  mount();
  watchKeys(app);
  watchTips();
  system.addEventListener("change", () => {
    setTheme();
    update();
  });
  await compute();
}

start();
