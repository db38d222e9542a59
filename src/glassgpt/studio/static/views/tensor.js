/* The tensors view: every tensor of the pass, cell by cell, and where each number came from. */

import { el, choice, field } from "../parts/dom.js";
import { heatmap } from "../parts/heatmap.js";
import { brief, count } from "../parts/numbers.js";
import { shape } from "../parts/shape.js";
import { terms } from "../parts/terms.js";
import { plain } from "../parts/tokens.js";

// Only a window of a large tensor is fetched, so that answers are small and cells can be seen.
const MOST_ROWS = 128;
const MOST_COLUMNS = 256;

export default {
  key: "tensor",
  title: { en: "Tensors", zh: "张量" },
  intro: {
    en: "Everything that the pass computed, by its name in the code. Choose a tensor, then a cell, "
      + "to see below how its number was computed: terms that add up to it.",
    zh: "这次前向计算得到的一切，按代码中的名字列出。选一个张量，再选一格：下方是得出它的算式，"
      + "各数相加正好相等。",
  },
  words: {
    en: {
      tensor: "Tensor", outside: "outside the blocks", block: "block {n}",
      values: "{n} numbers", window: "Shown", earlier: "Earlier", later: "Later",
      statistics: "mean {mean}, standard deviation {deviation}, from {least} to {most}",
      ofWindow: "of the part shown",
      unknown: "There is no tensor “{name}” in this model; it has {some} … The first one is shown.",
      noCell: "There is no cell {cell} in {name}, whose shape is {shape}.",
      picture: "Values of {name}",
      choose: "Choose a cell to see where its number came from.",
      aria: "Part that is shown",
    },
    zh: {
      tensor: "张量", outside: "块之外", block: "第 {n} 块",
      values: "{n} 个数", window: "显示", earlier: "往前", later: "往后",
      statistics: "均值 {mean}，标准差 {deviation}，从 {least} 到 {most}",
      ofWindow: "（所示部分）",
      unknown: "此模型没有名为“{name}”的张量；它有 {some} …… 现显示第一个。",
      noCell: "{name} 中没有格子 {cell}，其形状为 {shape}。",
      picture: "{name} 的值",
      choose: "选一格，看它的数从何而来。",
      aria: "哪一部分",
    },
  },

  mount(root, app) {
    const { t } = app;
    const choosing = el("div", { class: "controls" });
    const facts = el("p", { class: "facts" });
    const paging = el("div", { class: "paging" });
    const picture = heatmap(app, { label: t("picture", { name: "" }).trim(),
      onpick: (r, c) => picked(r, c) });
    const hint = el("p", { class: "quiet" }, t("choose"));
    const origin = terms(app);
    root.append(el("section", { class: "panel", "aria-label": t("tensor") }, choosing, facts,
      paging, picture.root), hint, origin.root);
    let drawn = null; // {activation, head, rows, columns}
    let start = [0, 0]; // row and column at which the window begins

    function picked(r, c) {
      app.set({ tensor: drawn.activation.name, cell: drawn.index(r, c) }, { replace: true });
    }

    return {
      async update(state, signal) {
        const activation = find(app, state.tensor);
        const cell = cellOf(app, activation, state.cell);
        const head = activation.shape.length < 3 ? null
          : cell ? cell[0] : Math.min(app.head, activation.shape[0] - 1);
        const whole = matrixOf(activation.shape);
        if (drawn?.activation.name !== activation.name) start = [0, 0];
        start = windowFor(start, whole, cell && at2(activation, cell));
        const [rows, columns] = [[start[0], Math.min(whole[0], start[0] + MOST_ROWS)],
          [start[1], Math.min(whole[1], start[1] + MOST_COLUMNS)]];
        showChoice(app, choosing, activation, head);
        const query = activation.shape.length === 1 ? { columns } : { head, rows, columns };
        const { data } = await app.api.tensor(activation.name, query, signal);
        const index = (r, c) => [...(head === null ? [] : [head]),
          ...(activation.shape.length === 1 ? [] : [start[0] + r]), start[1] + c];
        drawn = { activation, index };
        showFacts(app, facts, activation, data, rows, columns, whole);
        showPaging(app, paging, rows, columns, whole, (next) => {
          start = next;
          app.set({ cell: null }, { replace: true });
          app.again();
        });
        picture.show({
          name: activation.name, data, shape: [rows[1] - rows[0], columns[1] - columns[0]], index,
          scale: activation.name.endsWith("pattern") ? "share" : "diverging",
          masked: maskFor(activation, start), square: isSquare(activation),
          rowLabel: labels(app, activation, 0, start[0]),
          columnLabel: labels(app, activation, 1, start[1]),
          cursor: cell && at2(activation, cell).map((n, i) => n - start[i]),
        });
        hint.hidden = Boolean(cell);
        if (!cell) origin.hide();
        else origin.show(await app.api.cell(activation.name, cell, signal));
      },
    };
  },
};

// -- which tensor, which cell? -------------------------------------------------------------------

function find(app, name) {
  const { activations } = app.trace;
  const found = activations.find((activation) => activation.name === name);
  if (name && !found) {
    app.alerts.say(app.t("unknown", { name, some: activations.slice(0, 4).map((a) =>
      a.name).join(", ") }), "tensor");
  } else app.alerts.clear("tensor");
  return found ?? activations[0];
}

function cellOf(app, { name, shape: sizes }, cell) {
  const fits = Array.isArray(cell) && cell.length === sizes.length
    && cell.every((n, i) => Number.isInteger(n) && n >= 0 && n < sizes[i]);
  if (!fits && cell && name === app.state.tensor) {
    app.alerts.say(app.t("noCell", { cell: JSON.stringify(cell), name, shape: sizes.join(" × ") }),
      "cell");
  } else app.alerts.clear("cell");
  return fits ? cell : null;
}

/** Rows and columns: the last two dimensions; a list is one row. */
const matrixOf = (sizes) => (sizes.length === 1 ? [1, sizes[0]] : sizes.slice(-2));
const at2 = (activation, cell) => (activation.shape.length === 1 ? [0, cell[0]] : cell.slice(-2));

function windowFor(start, whole, at) {
  const most = [MOST_ROWS, MOST_COLUMNS];
  return start.map((from, i) => {
    const inside = !at || (at[i] >= from && at[i] < from + most[i]);
    const wanted = inside ? from : Math.floor(at[i] / most[i]) * most[i];
    return Math.max(0, Math.min(wanted, whole[i] - 1));
  });
}

const isSquare = ({ name }) => /(scores|pattern)$/.test(name);

function maskFor({ name }, [row, column]) {
  if (name.endsWith("pattern")) return (r, c) => column + c > row + r;
  return undefined; // -inf is masked
}

/** Labels of rows or columns: tokens if the letter of the dimension stands for tokens. */
function labels(app, activation, dimension, from) {
  const symbols = activation.symbols.slice(-2);
  const symbol = activation.symbols.length === 1 && dimension === 0 ? "1"
    : symbols[symbols.length - 2 + dimension] ?? symbols[0];
  const { tokens } = app.trace;
  if (symbol === "T" || symbol === "S") return (i) => `${from + i} ${plain(tokens[from + i])}`;
  if (symbol === "T-1") return (i) => `${from + i} ${plain(tokens[from + i + 1])}`;
  if (symbol === "1") return () => "";
  return (i) => String(from + i);
}

// -- what is around the picture ------------------------------------------------------------------

function showChoice(app, root, activation, head) {
  const { t } = app;
  const focused = root.contains(document.activeElement) ? document.activeElement.id : null;
  const layerOf = (name) => name.match(/^blocks\.(\d+)\./)?.[1] ?? null;
  const layer = layerOf(activation.name);
  const layers = [["", t("outside")], ...Array.from({ length: app.model.config.n_layer },
    (_, n) => [String(n), t("block", { n })])];
  const inLayer = app.trace.activations.filter((one) => layerOf(one.name) === layer);
  const pick = (name) => app.set({ tensor: name, cell: null });
  const where = choice(layers, layer ?? "", (n) => pick(n === ""
    ? app.trace.activations.find((one) => layerOf(one.name) === null).name
    : counterpart(app, activation.name, n)));
  const which = choice(inLayer.map(({ name }) => [name, name.replace(/^blocks\.\d+\./, "")]),
    activation.name, pick);
  where.id = "tensor-layer";
  which.id = "tensor-name";
  const boxes = [field(t("layer"), where), field(t("tensor"), which)];
  if (head !== null) {
    const heads = choice(Array.from({ length: activation.shape[0] }, (_, h) => [String(h),
      String(h)]), String(head), (h) => app.set({ head: Number(h), cell: null }));
    heads.id = "tensor-head";
    boxes.push(field(t("head"), heads));
  }
  root.replaceChildren(...boxes);
  if (focused) document.getElementById(focused)?.focus();
}

/** The tensor of the same name in block `n`; the first block has one that the others lack. */
function counterpart(app, name, n) {
  const wanted = `blocks.${n}.${name.replace(/^blocks\.\d+\./, "")}`;
  const { activations } = app.trace;
  return (activations.find((one) => one.name === wanted)
    ?? activations.find((one) => one.name.startsWith(`blocks.${n}.`))).name;
}

function showFacts(app, root, activation, data, rows, columns, whole) {
  const { t } = app;
  const finite = data.filter(Number.isFinite);
  const mean = finite.reduce((a, b) => a + b, 0) / (finite.length || 1);
  const square = finite.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (finite.length || 1);
  const part = rows[1] - rows[0] < whole[0] || columns[1] - columns[0] < whole[1]
    || activation.shape.length > 2;
  const least = finite.reduce((a, b) => Math.min(a, b), Infinity);
  const most = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  root.replaceChildren(el("b", null, el("code", null, activation.name)),
    shape(app, activation.symbols, activation.shape),
    el("span", null, t("values", { n: count(activation.shape.reduce((a, b) => a * b, 1)) })),
    el("span", null, t("statistics", { mean: brief(mean), deviation: brief(Math.sqrt(square)),
      least: brief(least), most: brief(most) }), part ? ` ${t("ofWindow")}` : ""));
}

function showPaging(app, root, rows, columns, whole, move) {
  const { t } = app;
  const start = [rows[0], columns[0]];
  const line = (i, key, [from, to], most) => {
    if (whole[i] <= most) return null;
    const go = (by) => () => move(start.map((at, k) => (k === i ? at + by : at)));
    return el("div", { class: "under", role: "group", "aria-label": t("aria") },
      el("span", { class: "quiet" }, t(key, { from, to: to - 1, all: count(whole[i]) })),
      el("button", { type: "button", disabled: from === 0, onclick: go(-most) }, t("earlier")),
      el("button", { type: "button", disabled: to >= whole[i], onclick: go(most) }, t("later")));
  };
  root.replaceChildren(...[line(0, "rows", rows, MOST_ROWS),
    line(1, "columns", columns, MOST_COLUMNS)].filter(Boolean));
}
