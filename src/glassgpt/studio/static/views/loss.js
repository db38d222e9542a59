/* The loss view: how much every token of the text surprised the model, and what it had expected. */

import { bars } from "../parts/bars.js";
import { el, field, segments } from "../parts/dom.js";
import { brief, count, percent } from "../parts/numbers.js";
import { roam } from "../parts/roam.js";
import { plain, tokenStrip, visible } from "../parts/tokens.js";

const EXPECTED = 8; // tokens that the model found likeliest
const MOST_ROWS = 1024;

export default {
  key: "loss",
  title: { en: "Loss", zh: "损失" },
  intro: {
    en: "The loss of a token is −ln of the probability that the model gave it: 0 means it was "
      + "certain, and each unit more means 2.7 times less likely. All that training does is to "
      + "make the mean of these numbers smaller. Paste any text above and see where the model is "
      + "surprised.",
    zh: "一个词元的损失是 −ln（模型给它的概率）：0 表示完全确定，每增加 1，可能性就小 2.7 倍。"
      + "训练不过是让这些数的平均值变小。在上方粘贴任意文本，看模型在哪里感到意外。",
  },
  state: { lossOrder: "text" },
  words: {
    en: {
      strip: "The text, coloured by loss: choose a token",
      mean: "{n} nats per token (mean loss)", perplexity: "perplexity {n}",
      bits: "{n} bits per byte", guess: "guessing blindly would cost {n}",
      calm: "expected", surprised: "surprise",
      every: "Token by token", order: "Order",
      "order.text": "as in the text", "order.loss": "most surprising first",
      position: "Position", token: "Token", loss: "Loss", p: "Probability", rank: "Rank",
      expected: "What the model expected at position {n}",
      was: "It was {token}: probability {p}, loss {loss}, rank {rank} of {all}.",
      undecided: "The model’s own uncertainty there was {n} nats of entropy.",
      first: "Nothing comes before the first token, so nothing predicts it.",
      tooShort: "A loss needs at least two tokens: write a longer text.",
      more: "{n} more tokens are not listed.",
    },
    zh: {
      strip: "按损失着色的文本：选择一个词元",
      mean: "每个词元 {n} 奈特（平均损失）", perplexity: "困惑度 {n}",
      bits: "每字节 {n} 比特", guess: "盲猜的代价是 {n}",
      calm: "意料之中", surprised: "意外",
      every: "逐个词元", order: "顺序",
      "order.text": "按文本顺序", "order.loss": "最意外的在前",
      position: "位置", token: "词元", loss: "损失", p: "概率", rank: "排名",
      expected: "模型在位置 {n} 的预期",
      was: "实际是 {token}：概率 {p}，损失 {loss}，在 {all} 个词元中排第 {rank}。",
      undecided: "模型当时自身的不确定性是 {n} 奈特的熵。",
      first: "第一个词元之前什么也没有，所以没有预测。",
      tooShort: "至少要有两个词元才有损失：请写长一些的文本。",
      more: "另有 {n} 个词元未列出。",
    },
  },

  mount(root, app) {
    const { t } = app;
    const choose = (at) => app.set({ position: at }, { replace: true });
    const facts = el("p", { class: "facts big" });
    const strip = tokenStrip(app, { label: t("strip"), onpick: choose });
    strip.root.id = "loss-tokens";
    strip.root.classList.add("flow");
    const scale = el("p", { class: "aside scale" }, t("calm"), " ",
      el("i", { class: "ramp" }), " ", t("surprised"));
    const detail = el("section", { class: "panel", "aria-live": "polite" });
    const list = bars(app, { label: t("expected", { n: "" }), heading: [t("token"), t("p")] });
    const order = el("div", { class: "controls" });
    const table = el("table", { class: "losses" });
    const keys = roam(table);
    root.append(
      el("section", { class: "panel", "aria-label": t("strip") }, facts, strip.root, scale), detail,
      el("section", { class: "panel", "aria-label": t("every") }, el("h2", null, t("every")), order,
        el("div", { class: "scroll tall" }, table)));

    return {
      async update(state, signal) {
        const answer = await app.api.ofTrace("loss", signal);
        const at = app.position;
        showFacts(app, facts, answer);
        const most = Math.log(app.model.vocab_size);
        strip.show(app.trace.tokens, at, { shade: answer.loss.map((loss) => shade(loss, most)) });
        order.replaceChildren(field(t("order"), segments(t("order"), ["text", "loss"].map((key) =>
          [key, t(`order.${key}`)]), state.lossOrder, (key) => app.set({ lossOrder: key },
          { replace: true }))));
        keys.redraw(() => table.replaceChildren(...rows(app, answer, choose)),
          () => table.querySelector(".now button"));
        const before = at === 0 ? null : await app.api.ofTrace("distribution", signal,
          { position: at - 1, show: EXPECTED });
        showDetail(app, detail, list, { answer, before, at });
      },
    };
  },
};

/** The colour behind a token: none if it was certain, the warm end of the scale if it surprised. */
const shade = (loss, most) => (loss === null ? null
  : `color-mix(in oklab, var(--more) ${(46 * Math.min(1, loss / most)).toFixed(1)}%, var(--sunk))`);

function showFacts(app, root, { mean, bits_per_byte: bits }) {
  const { t } = app;
  const guess = Math.log(app.model.vocab_size);
  if (mean === null) {
    root.replaceChildren(t("tooShort"));
    return;
  }
  root.replaceChildren(
    el("b", { "data-name": "loss", "data-index": "mean", "data-value": mean },
      t("mean", { n: brief(mean) })),
    el("span", { "data-name": "loss", "data-index": "bits_per_byte", "data-value": bits },
      t("bits", { n: brief(bits) })),
    el("span", null, t("perplexity", { n: brief(Math.exp(mean)) })),
    el("span", null, t("guess", { n: brief(guess, 3) })));
}

function rows(app, { loss, rank }, choose) {
  const { t, trace, state } = app;
  const most = Math.max(Math.log(app.model.vocab_size), ...loss.map((one) => one ?? 0));
  let listed = loss.map((_, i) => i);
  if (state.lossOrder === "loss") listed.sort((a, b) => (loss[b] ?? -1) - (loss[a] ?? -1));
  listed = listed.slice(0, MOST_ROWS);
  const head = ["position", "token", "loss", null, "p", "rank"].map((key) => el("th", {
    scope: "col", class: key === "token" || !key ? null : "number",
  }, key ? t(key) : el("span", { class: "unseen" }, t("bar"))));
  const row = (i) => el("tr", { class: i === app.position ? "now" : null, "data-name": "loss",
    "data-index": i, "data-value": loss[i], "data-rank": rank[i] },
  el("td", { class: "number" }, i),
  el("th", { scope: "row" }, el("button", { type: "button", class: "plain",
    onclick: () => choose(i) }, visible(trace.tokens[i]))),
  el("td", { class: "number" }, loss[i] === null ? "–" : brief(loss[i], 3)),
  el("td", { class: "lossbar", "aria-hidden": "true" }, loss[i] !== null
    && el("i", { style: `--share:${loss[i] / most}` })),
  el("td", { class: "number" }, loss[i] === null ? "–" : percent(Math.exp(-loss[i]))),
  el("td", { class: "number" }, rank[i] === null ? "–" : count(rank[i] + 1)));
  const left = loss.length - listed.length;
  return [el("caption", { class: "unseen" }, t("every")),
    el("thead", null, el("tr", null, head)), el("tbody", null, listed.map(row)),
    ...(left ? [el("tfoot", null, el("tr", null, el("td", { colspan: 6 },
      t("more", { n: count(left) }))))] : [])];
}

function showDetail(app, root, list, { answer, before, at }) {
  const { t, trace } = app;
  const title = t("expected", { n: at });
  root.setAttribute("aria-label", title);
  if (!before) {
    root.replaceChildren(el("h2", null, title), el("p", null, t("first")));
    return;
  }
  const loss = answer.loss[at];
  const real = trace.tokens[at].id;
  root.replaceChildren(el("h2", null, title),
    el("p", null, t("was", { token: plain(trace.tokens[at]), p: percent(Math.exp(-loss)),
      loss: brief(loss), rank: count(answer.rank[at] + 1), all: count(app.model.vocab_size) }), " ",
    el("span", { class: "quiet" }, t("undecided", { n: brief(before.stages[0].entropy, 3) }))),
    list.root);
  const shown = before.tokens.slice(0, EXPECTED);
  list.show(shown.map((token) => ({ label: visible(token), value: token.p, text: percent(token.p),
    tone: token.id === real ? "now" : "", data: { name: "expected", index: token.id } })),
  { most: 1 });
}
