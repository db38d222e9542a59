/* The experiments view: the model without a part, with a part from another text, or beside another
   model.

   Changes are in the state (off, fill, patch), so all other views show the changed model too; here
   it is compared with the unchanged one. Reset undoes all changes. */

import { choice, el, field, segments } from "../parts/dom.js";
import { compared, second } from "../parts/second.js";
import { differences } from "./differences.js";
import { partsGrid } from "./parts_grid.js";
import { patchMap } from "./patch_map.js";
import words from "./experiments_words.js";

const WHOLE = { off: [], patch: null };

export default {
  key: "experiments",
  title: { en: "Experiments", zh: "实验" },
  intro: {
    en: "A claim about what a part does can only be tested by taking the part away. Switch off "
      + "heads, MLPs and whole blocks, or give them what they computed for another text, and see "
      + "how the prediction changes.",
    zh: "关于某个部件作用的说法，只有把它拿掉才能检验。关闭注意力头、MLP 或整个块，"
      + "或者换成它们在另一段文本上的结果，看预测会变成什么样。",
  },
  state: { experiment: "off", other: "" },
  words,

  mount(root, app) {
    const { t } = app;
    const tools = el("div", { class: "controls" });
    const says = el("p", { class: "aside", role: "status" });
    const grid = partsGrid(app);
    const map = patchMap(app);
    const result = differences(app);
    const other = el("input", { type: "text", id: "other-text", spellcheck: "false",
      autocomplete: "off", onchange: () => app.set({ other: other.value, patch: null }) });
    const otherField = el("div", { class: "field grow" },
      el("label", { for: other.id }, t("other")), other);
    const reset = el("button", { type: "button", "data-act": "reset", onclick: () =>
      app.set({ ...WHOLE, fill: "zero", other: "" }) }, t("reset"));
    root.append(tools, el("div", { class: "controls" }, otherField), says, grid.root, map.root,
      result.root);

    return {
      async update(state, signal) {
        const kind = kindOf(app);
        showTools(app, tools, kind, reset);
        if (document.activeElement !== other) other.value = state.other;
        otherField.parentNode.hidden = kind !== "prompt";
        const { pair, note, chosen } = await this.pairOf(kind, state, signal);
        says.textContent = note ?? "";
        says.hidden = !note;
        grid.root.hidden = !chosen;
        if (chosen) grid.show(chosen);
        await map.update(kind === "prompt" && chosen ? pair.other : null, signal);
        if (pair) {
          const answer = await compared(app, pair.a, pair.b, signal);
          await result.update({ ...pair, answer });
        }
        result.root.hidden = !pair;
      },

      /** The two traces to compare, what the grid's parts do, and a line about it. */
      async pairOf(kind, state, signal) {
        if (kind === "off") return offPair(app, signal);
        if (kind === "models") return modelPair(app, signal);
        return promptPair(app, state, signal);
      },
    };
  },
};

function kindOf(app) {
  const { experiment } = app.state;
  const known = experiment === "prompt" || (experiment === "models" && app.model.models.length > 1);
  return known ? experiment : "off";
}

function showTools(app, root, kind, reset) {
  const { t, state, model } = app;
  const kinds = ["off", "prompt", ...(model.models.length > 1 ? ["models"] : [])];
  const focused = root.contains(document.activeElement) ? document.activeElement : null;
  const again = focused && [...root.querySelectorAll("button, select")].indexOf(focused);
  reset.disabled = !state.off.length && !state.patch && state.fill === "zero" && !state.other;
  root.replaceChildren(
    field(t("kind"), segments(t("kind"), kinds.map((key) => [key, t(`kind.${key}`)]), kind,
      (key) => app.set({ experiment: key, ...(key === "models" ? WHOLE : {}) }))),
    ...(kind === "off" ? [field(t("fill"), choice(["zero", "mean"].map((key) =>
      [key, t(`fill.${key}`)]), state.fill, (fill) => app.set({ fill })))] : []),
    reset);
  if (again >= 0 && focused !== null) root.querySelectorAll("button, select")[again]?.focus();
}

/** The trace that is shown, in the form of a second one. */
const shown = (app, signal) => second(app, {}, signal);

async function offPair(app, signal) {
  const { t, state } = app;
  const a = await second(app, WHOLE, signal);
  return {
    pair: { a, b: await shown(app, signal), names: [t("wholeModel"), t("changedModel")] },
    chosen: { label: t("grid.off"), parts: state.off,
      toggle: (part) => app.set({ off: flipped(state.off, part) }) },
    note: state.off.length ? t("offNow", { parts: state.off.join(", ") }) : t("offNone"),
  };
}

async function promptPair(app, state, signal) {
  const { t } = app;
  if (!state.other) return { note: t("otherEmpty") };
  const a = await second(app, WHOLE, signal);
  const other = await second(app, { ...WHOLE, text: state.other }, signal);
  const [here, there] = [a.tokens.length, other.tokens.length];
  const parts = state.patch?.parts ?? [];
  const plainly = { a, b: other, other, names: [t("firstText"), t("otherText")] };
  if (here !== there) return { pair: plainly, note: t("lengths", { a: here, b: there }) };
  const take = (next) => app.set({ patch: next.length
    ? { text: state.other, parts: next } : null });
  const chosen = { label: t("grid.patch"), parts, takes: true,
    toggle: (part) => take(flipped(parts, part)) };
  if (!parts.length) return { pair: plainly, chosen, note: t("patchNone") };
  const b = await shown(app, signal);
  return { chosen, note: t("patchNow", { parts: parts.join(", ") }),
    pair: { a, b, other, names: [t("firstText"), t("patchedText")] } };
}

async function modelPair(app, signal) {
  const { t, model } = app;
  const [a, b] = await Promise.all(model.models.slice(0, 2).map(({ key }) =>
    second(app, { ...WHOLE, model: key, snapshot: null }, signal)));
  const names = model.models.map((one) => one.name);
  return { pair: { a, b, names: names[0] === names[1] ? [`${names[0]} (a)`, `${names[1]} (b)`]
    : names }, note: t("modelsNote", { a: names[0], b: names[1] }) };
}

const flipped = (parts, part) => (parts.includes(part) ? parts.filter((one) => one !== part)
  : [...parts, part]);
