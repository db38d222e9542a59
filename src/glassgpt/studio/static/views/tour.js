/* The tour: questions about the reader's own model. It lets them guess, then shows the answer. */

import { el } from "../parts/dom.js";
import { QUESTIONS } from "./tour_questions.js";
import words from "./tour_words.js";

export default {
  key: "tour",
  title: { en: "Tour", zh: "导览" },
  intro: {
    en: "Eight questions about the model that is loaded here and the text above. Guess first: "
      + "you learn most from a wrong guess. Every answer is computed now, from this model.",
    zh: "八个问题，关于这里载入的模型和上方的文本。先猜一猜：猜错最长见识。"
      + "每个答案都由这个模型此刻算出。",
  },
  words,
  state: { stop: 0 },

  mount(root, app) {
    const { t } = app;
    const steps = el("ol", { class: "stops" });
    const card = el("section", { class: "panel question", "aria-labelledby": "question" });
    root.append(steps, card);
    const guesses = new Map(); // "stop/trace" -> what was guessed
    let shown = "";

    function showSteps(at) {
      steps.replaceChildren(...QUESTIONS.map((question, i) => el("li", null, el("button", {
        type: "button", "aria-current": i === at && "step", "aria-label":
          `${i + 1}. ${t(`${question.key}.title`)}`,
        onclick: () => app.set({ stop: i }) }, i + 1))));
    }

    async function showQuestion(at, signal) {
      const question = QUESTIONS[at];
      const key = `${at}/${app.trace.trace}/${app.layer}/${app.head}/${app.position}`;
      if (key === shown) return;
      card.replaceChildren(el("p", { class: "quiet" }, "…"));
      shown = "";
      const found = await question.find(app, signal);
      card.replaceChildren(
        el("h2", { id: "question" }, `${at + 1}. ${t(`${question.key}.title`)}`),
        el("p", null, t(`${question.key}.ask`, found.values ?? {})));
      const answer = el("div", { class: "answer", role: "status" });
      const options = el("div", { class: "options", role: "group", "aria-labelledby": "question" },
        found.options.map((option) => el("button", { type: "button", class: "option", onclick: () => {
          guesses.set(key, option.value);
          reveal(question, found, options, answer, option.value);
        }, "data-option": option.value }, option.label)));
      card.append(options, answer, moving(at));
      if (guesses.has(key)) reveal(question, found, options, answer, guesses.get(key));
      shown = key;
    }

    function reveal(question, found, options, answer, guess) {
      for (const button of options.children) {
        const right = button.dataset.option === String(found.answer);
        const mine = button.dataset.option === String(guess);
        button.classList.toggle("right", right);
        button.classList.toggle("mine", mine);
        button.setAttribute("aria-pressed", String(mine));
      }
      const right = String(guess) === String(found.answer);
      answer.replaceChildren(
        el("p", { "data-answer": found.answer }, el("b", null, t(right ? "right" : "wrong")), " ",
          t(`${question.key}.tell`, found.values ?? {})),
        found.proof ? el("div", { class: "proof" }, found.proof) : "",
        el("p", null, el("button", { type: "button", onclick: () => app.set(found.see ?? {
          view: question.view }) }, t("see"))));
    }

    function moving(at) {
      const go = (to, key, kind) => el("button", { type: "button", class: kind,
        disabled: !QUESTIONS[to], onclick: () => app.set({ stop: to }) }, t(key));
      return el("p", { class: "moving" }, go(at - 1, "back"), " ", go(at + 1, "on", "main"));
    }

    return {
      async update(state, signal) {
        const at = Math.max(0, Math.min(QUESTIONS.length - 1, state.stop));
        showSteps(at);
        await showQuestion(at, signal);
      },
    };
  },
};
