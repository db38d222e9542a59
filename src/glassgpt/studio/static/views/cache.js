/* The cache view: what the key/value cache saves, step by step, and what it costs in bytes.

   Every step asks the server's sampler for one token; it says how many positions it had to compute,
   how many it reused, and how large its cache is now. */

import { el } from "../parts/dom.js";
import { brief, bytes, count } from "../parts/numbers.js";
import { visible } from "../parts/tokens.js";
import { traceRequest } from "../state.js";
import words from "./cache_words.js";

const MANY = 10;

export default {
  key: "cache",
  title: { en: "KV cache", zh: "KV 缓存" },
  intro: {
    en: "To write the next token, the model needs the keys and values of every token before it. "
      + "They never change, so they are kept: after the prompt, each new token costs one position "
      + "instead of the whole text. The price is memory.",
    zh: "要写出下一个词元，模型需要之前每个词元的键和值。它们不会改变，所以被保存下来："
      + "读完提示之后，每个新词元只需计算一个位置，而不是整段文本。代价是内存。",
  },
  words,

  mount(root, app) {
    const { t } = app;
    let steps = []; // answers of the sampler, in order
    let key = null; // the request to which they belong
    let busy = false;
    const buttons = el("div", { class: "controls" });
    const facts = el("p", { class: "facts big" });
    const table = el("table", { class: "steps" });
    const sums = el("section", { class: "panel", "aria-label": t("bytes") });
    root.append(el("section", { class: "panel", "aria-label": t("steps") }, buttons, facts,
      legend(app), el("div", { class: "scroll tall", tabindex: "0", role: "group",
      "aria-label": t("steps") }, table)), sums);

    async function step(n) {
      if (busy) return;
      busy = true;
      try {
        for (let i = 0; i < n && !ended(steps); i++) {
          const asked = key;
          const { tokens, finish } = await app.api.post("sample", { prompt: promptIds(app),
            new: steps.map(({ id }) => id), n: 1, seed: app.state.seed, sample: 0,
            ...app.state.sampling, model: app.state.model, off: app.state.off,
            fill: app.state.fill, snapshot: app.state.snapshot });
          if (asked !== key) return; // the text has changed meanwhile
          steps.push(...tokens);
          if (finish === "end_of_text") steps.at(-1).end = true;
          draw();
        }
        app.alerts.clear("sample");
      } catch (error) {
        app.alerts.say(error.message, "sample");
      } finally {
        busy = false;
      }
    }

    function draw() {
      showFacts(app, facts, steps);
      showSteps(app, table, steps);
      showBytes(app, sums, steps);
      for (const button of buttons.querySelectorAll("[data-act^=step]")) {
        button.disabled = ended(steps) || Boolean(app.state.patch);
      }
    }

    buttons.append(
      el("button", { type: "button", class: "main", "data-act": "step", onclick: () => step(1) },
        t("step1")),
      el("button", { type: "button", "data-act": "stepMany", onclick: () => step(MANY) },
        t("stepMany", { n: MANY })),
      el("button", { type: "button", "data-act": "again", onclick: () => { steps = []; draw(); } },
        t("again")));

    return {
      update(state) {
        const now = JSON.stringify([traceRequest(state), state.sampling, state.seed]);
        if (now !== key) steps = [];
        key = now;
        draw();
      },
    };
  },
};

const promptIds = (app) => (app.state.tokens === null && app.state.text === "" ? []
  : app.trace.tokens.map(({ id }) => id));

const ended = (steps) => Boolean(steps.at(-1)?.end);

function legend(app) {
  const { t } = app;
  return el("p", { class: "aside" }, el("i", { class: "swatch reused" }), ` ${t("reused")} · `,
    el("i", { class: "swatch computed" }), ` ${t("computed")}`);
}

function showFacts(app, root, steps) {
  const { t } = app;
  if (!steps.length) {
    root.replaceChildren(t("begin", { n: count(app.trace.tokens.length) }));
    return;
  }
  const computed = steps.reduce((sum, step) => sum + step.computed, 0);
  const all = steps.reduce((sum, step) => sum + step.computed + step.reused, 0);
  root.replaceChildren(
    el("b", { "data-name": "cache", "data-index": "computed", "data-value": computed },
      t("with", { n: count(computed) })),
    el("span", { "data-name": "cache", "data-index": "all", "data-value": all },
      t("without", { n: count(all) })),
    el("span", null, t("saved", { n: brief(all / Math.max(1, computed), 3) })));
}

function showSteps(app, table, steps) {
  const { t } = app;
  const most = Math.max(1, ...steps.map((step) => step.computed + step.reused));
  const row = (step, i) => el("tr", { "data-name": "cache", "data-index": i,
    "data-value": step.cache_bytes, "data-computed": step.computed, "data-reused": step.reused,
    "data-token": step.id },
  el("td", { class: "number" }, i + 1),
  el("td", { class: "positions", "aria-hidden": "true" },
    el("i", { class: "reused", style: `--share:${step.reused / most}` }),
    el("i", { class: "computed", style: `--share:${step.computed / most}` })),
  el("td", { class: "number" }, count(step.reused)),
  el("td", { class: "number" }, count(step.computed)),
  el("td", { class: "number" }, bytes(step.cache_bytes)),
  el("th", { scope: "row" }, visible(step)));
  const heads = ["number", "positions", "reused", "computed", "bytes", "token"];
  table.replaceChildren(el("caption", { class: "unseen" }, t("steps")),
    el("thead", null, el("tr", null, heads.map((key) => el("th", { scope: "col",
      class: key === "positions" || key === "token" ? null : "number" }, t(`head.${key}`))))),
    el("tbody", null, steps.map(row)));
}

/** How the bytes per token are computed, factor by factor, and what a full context takes. */
function showBytes(app, root, steps) {
  const { t, model } = app;
  const { n_layer: L, n_kv_head: K, n_head: H, head_dim: D } = model.config;
  const context = model.context_length;
  const each = model.cache_bytes_per_token;
  const size = each / (2 * L * K * D);
  const held = steps.length ? steps.at(-1).cache_bytes : 0;
  const T = Math.round(held / each);
  const factor = (n, name) => el("span", { class: "factor" }, el("b", null, count(n)),
    el("small", null, name));
  const times = () => el("span", { class: "times", "aria-hidden": "true" }, "×");
  const product = [[2, t("factor.two")], [L, t("factor.L")], [K, t("factor.K")], [D, t("factor.D")],
    [size, t("factor.size")]].flatMap(([n, name], i) => (i ? [times(), factor(n, name)]
    : [factor(n, name)]));
  root.replaceChildren(
    el("h2", null, t("bytes")),
    el("p", { class: "product" }, product, el("span", { class: "times" }, "="),
      el("span", { class: "factor", "data-name": "cache", "data-index": "per_token",
        "data-value": each }, el("b", null, count(each)), el("small", null, t("perToken")))),
    el("table", { class: "list" }, el("caption", { class: "unseen" }, t("bytes")),
      el("tbody", null,
        line(t("now", { n: count(T) }), held, "now"),
        line(t("full", { n: count(context) }), each * context, "full"),
        line(t("weights"), model.parameters * size, "weights"))),
    ...(K < H ? [el("p", { class: "aside" }, t("grouped", { K, H, times: brief(H / K, 2) }))]
      : []));
}

const line = (text, n, index) => el("tr", { "data-name": "cache", "data-index": index,
  "data-value": n }, el("th", { scope: "row" }, text),
el("td", { class: "number" }, bytes(n)));
