/* The attention view: which token attends to which. All heads small, one large and step by step. */

import { el, segments } from "../parts/dom.js";
import { headGrid } from "../parts/grid.js";
import { heatmap } from "../parts/heatmap.js";
import { attentionLines } from "../parts/lines.js";
import { brief, bytes } from "../parts/numbers.js";
import { terms } from "../parts/terms.js";
import { plain } from "../parts/tokens.js";
import words from "./attention_words.js";

const LONG = 512; // tokens: in longer texts, a head is fetched only when somebody opens it

const STAGES = ["raw_scores", "scores", "masked_scores", "pattern", "weighted"];

export default {
  key: "attention",
  title: { en: "Attention", zh: "注意力" },
  intro: {
    en: "Every head lets each token look back and gather what it needs. Rows are the tokens that "
      + "look, columns those they look at; the darker a cell, the larger the share. Cells right of "
      + "the diagonal are empty: no token sees the future.",
    zh: "每个头让每个词元回头看，取它所需。行在提问，列在回答；格子越深，该行词元从该列取得越多。"
      + "对角线右侧为空：没有词元能看到未来。",
  },
  words,
  state: { stage: "pattern", hideFirst: false, opened: false },

  mount(root, app) {
    const { t } = app;
    const grid = headGrid(app, { onpick: (layer, head) => app.set({ layer, head, cell: null,
      opened: true }) });
    const title = el("h2", { id: "head-title" });
    const stages = el("div", { class: "controls" });
    const said = el("p", { class: "stage-text" });
    const sums = el("p", { class: "facts" });
    const picture = heatmap(app, { label: t("picture"), onpick: (r, c) => pickCell(app, r, c) });
    const lines = el("div");
    const opener = el("button", { type: "button", class: "main", hidden: true,
      onclick: () => app.set({ opened: true }, { replace: true }) });
    const large = el("div", { hidden: true }, stages, said, picture.root, sums);
    const origin = terms(app);
    root.append(
      el("div", { class: "two" },
        el("section", { class: "panel", "aria-label": t("grid") }, el("h2", null, t("grid")),
          el("p", { class: "quiet" }, t("grid.what")), grid.root),
        el("section", { class: "panel", "aria-label": t("looks") }, el("h2", null, t("looks")),
          lines)),
      el("section", { class: "panel", "aria-labelledby": "head-title" }, title, opener, large),
      origin.root);

    return {
      async update(state, signal) {
        const { layer, head, position } = app;
        grid.show(await app.api.maps(signal), layer, head);
        title.textContent = t("opened", { layer, head });
        showStages(app, stages, state);
        const share = (await shares(app, signal, [position, position + 1])).data;
        const { tokens } = app.trace;
        lines.replaceChildren(attentionLines(app, { tokens, position, shares: share }));
        opener.hidden = state.opened || tokens.length <= LONG;
        large.hidden = !opener.hidden;
        opener.textContent = t("open", { size: bytes(4 * tokens.length ** 2) });
        if (large.hidden) return;
        const pattern = await shares(app, signal);
        const stage = STAGES.includes(state.stage) ? state.stage : "pattern";
        said.textContent = t(`say.${stage}`, { position, root: brief(Math.sqrt(
          app.model.config.head_dim)), D: app.model.config.head_dim });
        await showStage(app, stage, pattern, picture, signal);
        await showSums(app, stage, pattern, sums, signal);
        await showOrigin(app, state, origin, signal);
      },
    };
  },
};

const nameOf = (app, short) => `blocks.${app.layer}.${short}`;

/** The pattern of the opened head, or some `rows`; with `hideFirst` without token 0, rows summing to
    1 again. */
async function shares(app, signal, rows) {
  const whole = await app.api.tensor(nameOf(app, "pattern"), { head: app.head, rows }, signal);
  const S = whole.shape[1];
  const data = app.state.hideFirst ? whole.data.slice() : whole.data;
  const row = (t) => data.subarray(t * S, (t + 1) * S);
  for (let t = 0; app.state.hideFirst && t < whole.shape[0]; t++) {
    const line = row(t);
    line[0] = 0;
    const sum = line.reduce((a, b) => a + b, 0);
    if (sum > 0) line.forEach((share, s) => { line[s] = share / sum; });
  }
  return { shape: whole.shape, data, row };
}

function showStages(app, root, state) {
  const { t } = app;
  const focused = root.contains(document.activeElement) ? document.activeElement.id : null;
  const hide = el("input", { type: "checkbox", id: "hide-first", checked: state.hideFirst,
    onchange: () => app.set({ hideFirst: hide.checked }, { replace: true }) });
  const choose = segments(t("stages"), STAGES.map((stage, i) => [stage,
    `${i + 1} ${t(`stage.${stage}`)}`]), state.stage, (stage) => app.set({ stage, cell: null }));
  [...choose.children].forEach((button, i) => { button.id = `stage-${STAGES[i]}`; });
  root.replaceChildren(choose, el("span", { class: "check" }, hide, " ",
    el("label", { for: "hide-first" }, t("hideFirst"))));
  if (focused) document.getElementById(focused)?.focus();
}

async function showStage(app, stage, pattern, picture, signal) {
  const { t, layer, head, position } = app;
  const { tokens } = app.trace;
  const label = (i) => `${i} ${plain(tokens[i])}`;
  if (stage === "weighted") {
    const { data, shape } = await weighted(app, pattern, signal);
    picture.show({ name: `blocks.${layer}.weighted`, data, shape, scale: "diverging",
      rowLabel: label, columnLabel: String, index: (s, d) => [head, position, s, d] });
    return;
  }
  const shown = stage === "pattern" ? pattern
    : await app.api.tensor(nameOf(app, stage), { head: app.head }, signal);
  const hidden = app.state.hideFirst && stage === "pattern";
  picture.show({
    name: nameOf(app, stage), data: shown.data, shape: shown.shape, square: true,
    scale: stage === "pattern" ? "share" : "diverging", most: stage === "pattern" ? 1 : undefined,
    rowLabel: label, columnLabel: label, index: (q, s) => [head, q, s],
    masked: stage === "pattern" ? (q, s) => s > q || (hidden && s === 0)
      : (q, s, value) => value === -Infinity,
    cursor: app.state.cell?.length === 3 ? app.state.cell.slice(1) : [position, position],
  });
  if (stage === "pattern" || stage === "masked_scores") return;
  app.announce(t("noMaskYet"));
}

/** What `position` gathers: the value vector of every token times its share. (S, D) */
async function weighted(app, pattern, signal) {
  const { n_head: H, n_kv_head: K } = app.model.config;
  const v = await app.api.tensor(nameOf(app, "v"), { head: Math.floor(app.head / (H / K)) }, signal);
  const [S, D] = [app.position + 1, v.shape[1]];
  const share = pattern.row(app.position);
  const data = new Float32Array(S * D);
  for (let s = 0; s < S; s++) {
    for (let d = 0; d < D; d++) data[s * D + d] = share[s] * v.data[s * D + d];
  }
  return { data, shape: [S, D] };
}

/** What the rows add up to, as a check of all steps. */
async function showSums(app, stage, pattern, root, signal) {
  const { t, position, head } = app;
  if (stage === "pattern") {
    const sum = pattern.row(position).reduce((a, b) => a + b, 0);
    root.replaceChildren(el("span", { "data-sum": sum }, t("rowSum", { position,
      sum: brief(sum, 6) })));
  } else if (stage === "weighted") {
    const { data, shape: [S, D] } = await weighted(app, pattern, signal);
    const out = await app.api.tensor(nameOf(app, "head_out"), { head,
      rows: [position, position + 1] }, signal);
    let off = 0;
    for (let d = 0; d < D; d++) {
      let sum = 0;
      for (let s = 0; s < S; s++) sum += data[s * D + d];
      off = Math.max(off, Math.abs(sum - out.data[d]));
    }
    root.replaceChildren(el("span", { "data-off": off }, t(app.state.hideFirst ? "sumsHidden"
      : "sums", { position, off: brief(off, 3) })));
  } else root.replaceChildren();
}

function pickCell(app, row, column) {
  const stage = app.state.stage;
  if (stage === "weighted") return app.set({ position: row }, { replace: true });
  return app.set({ tensor: nameOf(app, stage), cell: [app.head, row, column], position: row },
    { replace: true });
}

async function showOrigin(app, state, origin, signal) {
  const mine = state.cell?.length === 3 && state.tensor === nameOf(app, state.stage);
  if (!mine) return origin.hide();
  return origin.show(await app.api.cell(state.tensor, state.cell, signal));
}
