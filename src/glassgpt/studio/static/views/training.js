/* The training view: the loss curve, and what the snapshots of a training make of the same text. */

import { bars } from "../parts/bars.js";
import { curve } from "../parts/curve.js";
import { el, field, toggle } from "../parts/dom.js";
import { headGrid } from "../parts/grid.js";
import { brief, count, percent } from "../parts/numbers.js";
import { visible } from "../parts/tokens.js";

const POLL = 2000; // ms, while the run is in progress
const N_SAMPLED = 60;

export default {
  key: "training",
  title: { en: "Training", zh: "训练" },
  intro: {
    en: "How this model learned. The loss says how much text surprises it: at first it finds all "
      + "tokens equally likely, then it learns which ones are common, then words, then their "
      + "order. Move the slider to read the same text with the model of an earlier moment.",
    zh: "这个模型的来历。损失是它对文本的意外程度：起初它在所有词元中平均地猜，随后学会哪些常见，"
      + "再学会词，再学会词的先后。移动滑块，用更早的它来看同一段文本。",
  },
  words: {
    en: {
      curve: "Loss while learning", train: "training", val: "validation", guess: "guessing: {loss}",
      none: "There is no record of this model’s training: metrics.jsonl is missing.",
      noSnapshots: "This run kept no snapshots. Train with --snapshots to see the model at earlier "
        + "steps.",
      running: "This run is in progress; the curve grows as it learns.",
      last: "step {step} · {tokens} tokens read",
      slider: "Moment of training", moment: "The model at this moment",
      next: "Likeliest next tokens", token: "Token", probability: "Probability",
      written: "What it writes", lens: "Last token, read after each block",
      play: "Play",
      start: "embedding", after: "After", says: "It would say",
    },
    zh: {
      curve: "学习过程中的损失", train: "训练", val: "验证", guess: "瞎猜：{loss}",
      none: "没有此模型的训练记录：缺少 metrics.jsonl。",
      noSnapshots: "这次训练没有保留快照。用 --snapshots 训练，即可查看更早步骤的模型。",
      running: "训练正在进行；曲线会随学习而延伸。",
      last: "第 {step} 步 · 已读 {tokens} 个词元",
      slider: "训练时刻", moment: "此刻的模型",
      next: "最可能的下一个词元", token: "词元", probability: "概率",
      written: "它写出的文字", lens: "最后一个词元，逐块读出",
      play: "播放",
      start: "嵌入", after: "之后", says: "它会说",
    },
  },
  alone: true,

  mount(root, app) {
    const { t } = app;
    const note = el("p", { class: "facts" });
    const slider = el("div", { class: "controls moment" });
    const chart = curve(app, { label: t("curve"), onpick: (step) => pickNear(app, step) });
    const grid = headGrid(app, { onpick: (layer, head) => app.set({ view: "attention", layer,
      head }) });
    const next = bars(app, { label: t("next"), heading: [t("token"), t("probability")] });
    const written = el("p", { class: "written" });
    const lens = el("div", { class: "scroll-x" });
    const moment = el("div", { class: "two" },
      panel(t("grid"), grid.root),
      el("div", null, panel(t("next"), next.root), panel(t("lens"), lens)));
    root.append(panel(t("curve"), note, slider, chart.root),
      el("h2", null, t("moment")), moment, panel(t("written"), written));
    let timer = 0;
    let playing = 0;

    /** Asks again and again while the run is in progress; an error is shown and ends it. */
    async function showCurve(signal) {
      const training = await app.api.get("training", signal);
      app.model.snapshots = training.snapshots;
      drawCurve(app, chart, note, training);
      showSlider();
      clearTimeout(timer);
      if (training.running) {
        timer = setTimeout(() => showCurve(signal).catch((error) =>
          error.name !== "AbortError" && app.alerts.say(error.message, "training")), POLL);
      }
    }

    function showSlider() {
      const steps = [...app.model.snapshots, null]; // the last is the model as saved
      const at = Math.max(0, steps.indexOf(app.state.snapshot));
      const input = slider.querySelector("input");
      const text = steps[at] === null ? t("best") : t("step", { n: count(steps[at]) });
      if (steps.length === 1) return slider.replaceChildren(el("p", { class: "quiet" },
        t("noSnapshots")));
      if (input && Number(input.max) === steps.length - 1) {
        input.value = at;
        input.setAttribute("aria-valuetext", text);
        slider.querySelector("output").textContent = text;
        return undefined;
      }
      const range = el("input", { type: "range", min: 0, max: steps.length - 1, step: 1,
        "aria-valuetext": text, oninput: () => app.set({ snapshot: steps[Number(range.value)] },
          { replace: true }) });
      range.value = at;
      return slider.replaceChildren(field(t("slider"), range, { class: "field grow" }),
        el("output", null, text), toggle(t("play"), false, play));
    }

    function play(event) {
      const button = event.currentTarget;
      clearInterval(playing);
      if (button.getAttribute("aria-pressed") === "true") {
        button.setAttribute("aria-pressed", "false");
        return;
      }
      button.setAttribute("aria-pressed", "true");
      let at = -1;
      const advance = () => {
        const steps = [...app.model.snapshots, null];
        app.set({ snapshot: steps[++at] }, { replace: true });
        if (at < steps.length - 1) return;
        clearInterval(playing);
        button.setAttribute("aria-pressed", "false");
      };
      playing = setInterval(advance, 1500);
      advance();
    }

    return {
      async update(state, signal) {
        if (app.model.training) await showCurve(signal);
        else {
          note.textContent = t("none");
          chart.root.hidden = true;
          showSlider();
        }
        moment.hidden = !app.trace;
        if (!app.trace) return;
        grid.show(await app.api.maps(signal), app.layer, app.head);
        next.show(app.trace.next.top.slice(0, 8).map(({ id, text, p }) => ({ value: p,
          label: visible({ id, text }), text: percent(p), data: { id } })), { most: 1 });
        showLens(app, lens, await app.api.ofTrace("lens?k=1", signal));
        await write(app, written, state, signal);
      },
      leave() {
        clearTimeout(timer);
        clearInterval(playing);
      },
    };
  },
};

const panel = (title, ...content) => el("section", { class: "panel", "aria-label": title },
  el("h2", null, title), content);

/** The snapshot nearest to a step of the curve. */
function pickNear(app, step) {
  const { snapshots } = app.model;
  if (!snapshots.length) return;
  app.set({ snapshot: snapshots.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a)) });
}

function drawCurve(app, chart, note, { rows, running, guessing }) {
  const { t } = app;
  const points = (name) => rows.filter((row) => row[name] !== null && row[name] !== undefined)
    .map((row) => [row.step, row[name]]);
  chart.root.hidden = !rows.length;
  if (!rows.length) return;
  chart.show({ series: [{ name: t("train"), kind: "train_loss", points: points("train_loss") },
    { name: t("val"), kind: "val_loss", points: points("val_loss") }],
  level: { y: guessing, name: t("guess", { loss: brief(guessing, 3) }) },
  now: app.state.snapshot ?? undefined });
  const { step, tokens } = rows.at(-1);
  note.replaceChildren(el("span", { class: "key train_loss" }, t("train")),
    el("span", { class: "key val_loss" }, t("val")),
    el("span", null, t("last", { step: count(step), tokens: count(tokens ?? 0) })),
    running ? el("b", { "data-running": true }, t("running")) : "");
}

/** After each block: the token that would follow the last one. */
function showLens(app, root, { rows }) {
  const { t } = app;
  root.replaceChildren(el("table", { class: "list" },
    el("thead", null, el("tr", null, ["after", "says", "probability"].map((key) =>
      el("th", { scope: "col" }, t(key))))),
    el("tbody", null, rows.map(({ name, positions }, i) => {
      const [best] = positions.at(-1).top;
      const label = i === 0 ? t("start") : name.replace(/^blocks\./, "").replace(".resid_post", "");
      return el("tr", { "data-name": name }, el("td", null, i === 0 ? label
        : `${t("layer")} ${label}`), el("th", { scope: "row" }, el("span", { class: "piece" },
        visible(best))), el("td", { class: "number", "data-value": best.p }, percent(best.p)));
    }))));
}

async function write(app, root, state, signal) {
  const { model, off, fill, snapshot, seed, sampling } = state;
  const prompt = app.trace.tokens.map(({ id }) => id);
  const drawn = await app.api.post("sample", { prompt, n: N_SAMPLED, seed, model, off, fill,
    snapshot, ...sampling }, signal);
  root.replaceChildren(el("span", { class: "quiet" }, app.trace.tokens.map(({ text }) => text)),
    ...drawn.tokens.map(({ id, text }) => el("span", { "data-id": id }, text)));
}
