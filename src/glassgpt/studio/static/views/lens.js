/* The logit lens: what the head would say if it read the residual stream after each layer, and
   which parts wrote a logit.

   The last row is the model's output. Cells are buttons; data attributes hold the exact numbers. */

import { bars } from "../parts/bars.js";
import { choice, el, field, toggle } from "../parts/dom.js";
import { brief, percent } from "../parts/numbers.js";
import { roam } from "../parts/roam.js";
import { plain, visible } from "../parts/tokens.js";
import { attributionPanel } from "./attribution.js";

const WIDTH = 24; // positions drawn at once
const SHOWN = 8; // tokens of a cell's distribution

export default {
  key: "lens",
  title: { en: "Logit lens", zh: "逐层透视" },
  intro: {
    en: "Stop the model early. After every layer, the final norm and the head can already read the "
      + "residual stream: this is what the model would answer if that layer were the last. Watch "
      + "how a guess becomes the answer. The bottom row is the model’s real output.",
    zh: "让模型提前停下。每一层之后，最终归一化和输出头都可以直接读取残差流："
      + "这就是“如果到此为止”模型会给出的回答。看一个猜测如何变成答案。最下面一行是模型真正的输出。",
  },
  state: { lensRow: null, lensShade: "p", lensToken: null, lensAgainst: null },
  words: {
    en: {
      grid: "The likeliest next token after each layer (rows) at each position (columns)",
      shade: "Colour shows",
      "shade.p": "how sure it is",
      "shade.final": "probability of the final answer",
      "shade.entropy": "how undecided it is (entropy)",
      start: "embedding", after: "after block {n}", output: "output",
      stream: "Stream", reads: "reads",
      settles: "settled",
      settledNote: "Block after which the answer no longer changes",
      earlier: "← earlier", later: "later →",
      range: "positions {from} to {to} of {all}",
      cell: "{row}, position {position}",
      cellSays: "{row}, position {position}: {token}, {p}",
      entropy: "Entropy {n} nats, of at most {most}",
      finalP: "Probability of the final answer {token} here: {p}",
      distribution: "What it would say here",
      token: "Token", p: "Probability",
      same: "A framed cell already gives the final answer.",
      attribution: "Who wrote this logit?",
      attributionNote: "The logit of a token is a sum over everything that was added to the "
      + "residual stream, as the head reads it (direct logit attribution; the final norm is held "
      + "fixed).",
      of: "Logit of", against: "compared with", nobody: "nothing",
      part: "Part", value: "Adds", rest: "{n} smaller parts", total: "Sum = logit",
      totalAgainst: "Sum = difference of the logits",
      "part.token_embedding": "token embedding", "part.position_embedding": "position embedding",
      "part.final_norm bias": "bias of the final norm",
      "part.attn bias": "block {n}: attention bias",
      "part.head": "block {n}: head {h}", "part.mlp": "block {n}: MLP",
      "part.edited": "block {n}: what was put in its place",
      allParts: "All parts by block", block: "Block",
      up: "pushes the token up", down: "pushes it down",
    },
    zh: {
      grid: "每一层（行）在每个位置（列）上最可能的下一个词元",
      shade: "颜色表示",
      "shade.p": "有多确定",
      "shade.final": "最终答案的概率",
      "shade.entropy": "有多犹豫（熵）",
      start: "嵌入", after: "第 {n} 块之后", output: "输出",
      stream: "残差流", reads: "读到",
      settles: "定下",
      settledNote: "从哪一块之后答案不再改变",
      earlier: "← 更早", later: "更晚 →",
      range: "位置 {from} 到 {to}，共 {all}",
      cell: "{row}，位置 {position}",
      cellSays: "{row}，位置 {position}：{token}，{p}",
      entropy: "熵 {n} 奈特，最大为 {most}",
      finalP: "最终答案 {token} 在这里的概率：{p}",
      distribution: "它在这里会说什么",
      token: "词元", p: "概率",
      same: "带边框的格子已经给出最终答案。",
      attribution: "这个 logit 是谁写的？",
      attributionNote: "一个词元的 logit 就是一个和：所有曾经加进残差流的东西，由输出头读出"
        + "（直接 logit 归因；最终归一化的系数视为固定）。",
      of: "词元的 logit", against: "相比于", nobody: "不比较",
      part: "部件", value: "贡献", rest: "其余 {n} 个较小的部件", total: "总和 = logit",
      totalAgainst: "总和 = 两个 logit 之差",
      "part.token_embedding": "词元嵌入", "part.position_embedding": "位置嵌入",
      "part.final_norm bias": "最终归一化的偏置", "part.attn bias": "第 {n} 块：注意力偏置",
      "part.head": "第 {n} 块：第 {h} 头", "part.mlp": "第 {n} 块：MLP",
      "part.edited": "第 {n} 块：被替换进来的部分",
      allParts: "每个部件在它的位置上", block: "块",
      up: "推高该词元", down: "压低该词元",
    },
  },

  mount(root, app) {
    const { t } = app;
    const tools = el("div", { class: "controls" });
    const table = el("table", { class: "lens" });
    const grid = roam(table);
    const cell = el("section", { class: "panel", "aria-label": t("distribution") });
    const list = bars(app, { label: t("distribution"), heading: [t("token"), t("p")],
      onpick: (row) => app.set({ lensToken: row.id }) });
    const written = attributionPanel(app);
    root.append(tools, el("div", { class: "scroll" }, table),
      el("p", { class: "aside" }, t("same")), cell, written.root);

    return {
      async update(state, signal) {
        const T = app.trace.tokens.length;
        const to = Math.min(T, Math.max(WIDTH, app.position + 1));
        const from = Math.max(0, to - WIDTH);
        const lens = await app.api.ofTrace(`lens?from=${from}&to=${to}&k=${SHOWN}`, signal);
        const row = chosenRow(state, lens);
        showTools(app, tools, { from, to, T });
        grid.redraw(() => showGrid(app, table, lens, { from, to, row }),
          () => table.querySelector('[aria-pressed="true"]'));
        showChosen(table);
        showCell(app, cell, list, lens, { from, row });
        const last = lens.rows.at(-1).positions[app.position - from].top;
        await written.update(last, signal);
      },
    };
  },
};

const chosenRow = (state, lens) => {
  const last = lens.rows.length - 1;
  const row = Number.isInteger(state.lensRow) ? state.lensRow : last;
  return Math.min(Math.max(0, row), last);
};

/** The name of a row of the lens. */
function rowName(app, i, rows) {
  if (i === 0) return app.t("start");
  const after = app.t("after", { n: i - 1 });
  return i === rows.length - 1 ? `${after} = ${app.t("output")}` : after;
}

function showTools(app, root, { from, to, T }) {
  const { t, state } = app;
  const move = (position) => () => app.set({ position }, { replace: true });
  root.replaceChildren(
    field(t("shade"), choice(["p", "final", "entropy"].map((key) => [key, t(`shade.${key}`)]),
      state.lensShade, (key) => app.set({ lensShade: key }, { replace: true }))),
    ...(T > WIDTH ? [el("div", { class: "pages" },
      el("button", { type: "button", disabled: from === 0, onclick: move(Math.max(0, from - 1)) },
        t("earlier")),
      el("span", null, t("range", { from, to: to - 1, all: T })),
      el("button", { type: "button", disabled: to === T,
        onclick: move(Math.min(T - 1, to + WIDTH - 1)) }, t("later")))] : []));
}

function showGrid(app, table, lens, { from, to, row }) {
  const { t, trace } = app;
  const most = Math.log(app.model.vocab_size);
  const texts = trace.tokens.slice(from, to);
  const share = (position) => ({ p: position.top[0].p, final: position.p_final,
    entropy: position.entropy / most })[app.state.lensShade] ?? position.top[0].p;
  table.replaceChildren(
    el("caption", { class: "unseen" }, t("grid")),
    el("thead", null, el("tr", null, el("th", { scope: "col" }, t("stream")),
      texts.map((token, i) => el("th", { scope: "col", class: from + i === app.position ? "now"
        : null }, el("small", null, from + i), visible(token))))),
    el("tbody", null, lens.rows.map((line, r) => el("tr", null,
      el("th", { scope: "row" }, rowName(app, r, lens.rows)),
      line.positions.map((position, i) => el("td", null, cellButton(app, lens, { position, line, r,
        at: from + i, final: lens.final[i], chosen: r === row && from + i === app.position,
        share: share(position) })))))),
    el("tfoot", null, el("tr", null, el("th", { scope: "row", title: t("settledNote") },
      t("settles")), texts.map((_, i) => el("td", null, settledAt(lens, i))))));
}

/** Scrolls the table, not the page, to where the chosen cell is. */
function showChosen(table) {
  const frame = table.parentNode.getBoundingClientRect();
  const cell = table.querySelector('[aria-pressed="true"]').getBoundingClientRect();
  const head = table.querySelector("tbody th").offsetWidth; // stays at the left edge
  if (cell.right > frame.right) table.parentNode.scrollLeft += cell.right - frame.right + 8;
  if (cell.left < frame.left + head) table.parentNode.scrollLeft -= frame.left + head - cell.left;
}

function cellButton(app, lens, { position, line, r, at, final, chosen, share }) {
  const best = position.top[0];
  const button = toggle(visible(best), chosen,
    () => app.set({ position: at, lensRow: r, lensToken: null, lensAgainst: null },
      { replace: true }),
    { class: best.id === final ? "settled" : null, style: `--share:${share.toFixed(3)}`,
      "data-name": line.name, "data-index": at, "data-value": best.p, "data-token": best.id,
      "data-entropy": position.entropy, "data-final": position.p_final,
      "aria-label": app.t("cellSays", { row: rowName(app, r, lens.rows), position: at,
        token: plain(best), p: percent(best.p) }) });
  return button;
}

/** The first block after which every row has the final answer; "–" stands for the embedding. */
function settledAt(lens, i) {
  const differs = lens.rows.map((line) => line.positions[i].top[0].id !== lens.final[i]);
  const since = differs.lastIndexOf(true) + 1;
  return since === 0 ? "–" : since - 1;
}

function showCell(app, root, list, lens, { from, row }) {
  const { t } = app;
  const position = lens.rows[row].positions[app.position - from];
  const final = lens.rows.at(-1).positions[app.position - from].top[0];
  root.replaceChildren(
    el("h2", null, t("distribution"), " ", el("small", null, t("cell", {
      row: rowName(app, row, lens.rows), position: app.position }))),
    list.root,
    el("p", { class: "facts" },
      el("span", null, t("entropy", { n: brief(position.entropy, 3),
        most: brief(Math.log(app.model.vocab_size), 3) })),
      el("span", null, t("finalP", { token: plain(final), p: percent(position.p_final) }))));
  list.show(position.top.map((token) => ({ id: token.id, label: visible(token), value: token.p,
    text: percent(token.p), tone: token.id === final.id ? "now" : "",
    data: { name: "lens", index: token.id } })), { most: 1 });
}
