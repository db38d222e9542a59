/* The view of the next token: its distribution, each filter in its order, and drawing by hand.

   Tokens come from the server's sampler: the same ones as those of `glassgpt sample` with the same
   seed. They form a tree (tree.js); the ids that lead to the current node are in the URL. */

import { el, field } from "../parts/dom.js";
import { roam } from "../parts/roam.js";
import { second } from "../parts/second.js";
import { traceRequest } from "../state.js";
import { distributionPanel } from "./distribution.js";
import { settings } from "./sampling.js";
import * as tree from "./tree.js";
import words from "./next_words.js";

const SHOWN = 60; // tokens of the distribution
const MANY = 20; // tokens that "draw more" draws
const TRIES = 12; // sample numbers tried for a branch that isn't there yet

const trees = new Map(); // request -> tree of what was drawn; kept while other views are shown

export default {
  key: "next",
  title: { en: "Next token", zh: "下一个词元" },
  intro: {
    en: "A language model does one thing: it gives every token of its vocabulary a probability of "
      + "being next. Change that distribution, watch what each filter cuts, and draw a token – or "
      + "choose one yourself.",
    zh: "语言模型只做一件事：给词表里的每个词元一个“成为下一个”的概率。"
      + "弯曲这个分布，看每个过滤器切掉了什么，然后抽取——或者自己决定。",
  },
  state: { drawn: [], sample: 0 },
  words,

  mount(root, app) {
    const { t } = app;
    const chips = el("div", { class: "tree", role: "group", "aria-label": t("tree") });
    const keys = roam(chips, ".chain");
    const text = el("p", { class: "so-far" });
    const same = el("p", { class: "aside same" });
    const buttons = el("div", { class: "controls" });
    const knobs = settings(app);
    let now = null; // the current node
    let here = null; // the current tree
    const go = (node) => app.set({ drawn: tree.pathOf(node).map(({ id }) => id) });
    const panel = distributionPanel(app, (token) => go(tree.grow(now, { ...token, how: "forced",
      end: token.id === app.model.tokenizer.end_of_text })));

    root.append(
      el("section", { class: "panel", "aria-label": t("tree") }, text, buttons, chips, same),
      el("div", { class: "two" }, el("div", null, knobs.root, panel.stages), panel.list));

    /** Asks the sampler for `n` tokens after node `from`; grows the tree by them. */
    async function draw(from, n, sample) {
      const { tokens, finish } = await app.api.post("sample", { prompt: promptIds(app),
        new: tree.pathOf(from).map(({ id }) => id), n, seed: app.state.seed, sample,
        ...app.state.sampling, model: app.state.model, off: app.state.off, fill: app.state.fill,
        snapshot: app.state.snapshot });
      const last = tokens.reduce((node, token) => tree.grow(node, { ...token, how: "drawn", sample,
        end: token.id === app.model.tokenizer.end_of_text }), from);
      if (finish === "end_of_text") last.end = true; // chat models have several such tokens
      return last;
    }

    async function branch() {
      const from = now;
      const known = new Set(from.children);
      for (let sample = app.state.sample + 1; sample <= app.state.sample + TRIES; sample++) {
        const node = await draw(from, 1, sample);
        if (!known.has(node)) {
          app.set({ sample, drawn: tree.pathOf(node).map(({ id }) => id) });
          return;
        }
      }
      app.announce(t("noOther", { n: TRIES }));
      same.textContent = t("noOther", { n: TRIES });
    }

    const act = (work) => async () => {
      try {
        await work();
      } catch (error) {
        if (error.name !== "AbortError") app.alerts.say(error.message, "sample");
      }
    };

    function showButtons() {
      const ended = now.end || Boolean(app.state.patch);
      const button = (name, work, off, main) => el("button", { type: "button", "data-act": name,
        class: main ? "main" : null, disabled: off, onclick: act(work) }, t(name, { n: MANY }));
      const focused = buttons.contains(document.activeElement)
        ? document.activeElement.dataset.act : null;
      buttons.replaceChildren(
        button("draw", async () => go(await draw(now, 1, app.state.sample)), ended, true),
        button("drawMany", async () => go(await draw(now, MANY, app.state.sample)), ended),
        button("branch", branch, ended),
        button("undo", () => go(tree.prune(now)), !now.parent),
        button("startOver", () => {
          here.children.length = 0;
          app.set({ drawn: [], sample: 0 });
        }, !here.children.length && app.state.sample === 0),
        button("asPrompt", () => app.set({ tokens: [...app.trace.tokens.map(({ id }) => id),
          ...tree.pathOf(now).map(({ id }) => id)], drawn: [], position: null }), !now.parent));
      const again = focused && buttons.querySelector(`[data-act="${focused}"]`);
      if (again && !again.disabled) again.focus();
      else if (again) buttons.querySelector("button:not(:disabled)")?.focus();
    }

    return {
      async update(state, signal) {
        here = treeOf(app);
        if (!here) {
          app.set({ drawn: [] }, { replace: true });
          return;
        }
        const prompt = promptIds(app);
        const begun = app.trace.tokens.map(({ id }) => id); // one token if the text is empty
        const whole = state.drawn.length ? await second(app, { patch: null,
          tokens: seen(begun, state.drawn, app.model.context_length) }, signal) : null;
        now = tree.follow(here, state.drawn) ?? fromLink(app, here, state.drawn, whole.tokens);
        const how = { position: -1, ...state.sampling, show: SHOWN,
          seen: [...prompt, ...state.drawn] };
        const answer = whole ? await whole.post("distribution", how)
          : await app.api.ofTrace("distribution", signal, how);
        signal.throwIfAborted();
        app.alerts.clear("sample");
        showText(app, text, now);
        same.textContent = state.patch ? t("patchedNote") : command(app, now);
        showButtons();
        keys.redraw(() => tree.show(app, chips, { tree: here, now, onpick: go }),
          () => chips.querySelector("[aria-current]"));
        showCurrent(chips);
        knobs.update();
        panel.show(answer);
      },
    };
  },
};

/** The prompt's ids for `sample`: none for an empty text, for which the model reads one token. */
function promptIds(app) {
  const { text, tokens } = app.state;
  return tokens === null && text === "" ? [] : app.trace.tokens.map(({ id }) => id);
}

/** The tree of this request. Null: the request is new, the ids in the state are of another. */
function treeOf(app) {
  const key = JSON.stringify(traceRequest(app.state));
  if (trees.has(key)) return trees.get(key);
  const stale = trees.size > 0 && app.state.drawn.length > 0;
  trees.set(key, tree.seed());
  return stale ? null : trees.get(key);
}

function fromLink(app, here, drawn, tokens) {
  const texts = tokens.slice(-drawn.length);
  return drawn.reduce((node, id, i) => tree.grow(node, { ...(texts.length === drawn.length
    ? texts[i] : { text: `#${id}` }), id, how: "link",
  end: id === app.model.tokenizer.end_of_text }), here);
}

/** What the model sees: when its context is full, it starts again from the newest half. */
function seen(prompt, drawn, limit) {
  const tokens = [...prompt];
  let start = 0;
  for (const id of drawn) {
    const full = tokens.length - start === limit;
    tokens.push(id);
    if (full) start = tokens.length - Math.max(1, Math.floor(limit / 2));
  }
  return tokens.slice(start);
}

function showText(app, root, now) {
  const path = tree.pathOf(now);
  const before = app.trace.tokens.map((token) => (token.special ? "" : token.text)).join("");
  root.replaceChildren(el("span", { class: "quiet" }, before.length > 300
    ? `…${before.slice(-300)}` : before), el("b", { "data-name": "text" },
    path.map((node) => (node.end ? "" : node.text)).join("")),
  el("span", { class: "cursor", "aria-hidden": "true" }));
}

/** Scrolls the tree, not the page. */
function showCurrent(root) {
  const frame = root.getBoundingClientRect();
  const chip = root.querySelector("[aria-current]").getBoundingClientRect();
  if (chip.bottom > frame.bottom) root.scrollTop += chip.bottom - frame.bottom + 6;
  if (chip.top < frame.top) root.scrollTop -= frame.top - chip.top + 6;
}

/** The command that gives the same text, or null if there is none. */
function command(app, now) {
  const { state, model, t } = app;
  const path = tree.pathOf(now);
  const plainly = path.length && path.every((node) => node.how === "drawn" && node.sample === 0)
    && !state.off.length && state.snapshot === null && state.tokens === null
    && state.text !== "-" && !state.text.startsWith("@");  // which the command line reads from files
  if (!plainly) return "";
  const quoted = `'${state.text.replaceAll("'", "'\\''")}'`;
  const options = Object.entries(state.sampling).map(([name, value]) =>
    `--${name.replaceAll("_", "-")} ${value}`);
  const run = (model.models.find((one) => one.key === state.model) ?? model.models[0]).run;
  return `${t("same")} ${["glassgpt sample", run, "--prompt", quoted, "--seed", state.seed,
    "--max-new-tokens", path.length, ...options].join(" ")}`;
}
