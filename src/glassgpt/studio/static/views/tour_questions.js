/* The tour's questions. Each finds, from the model that is loaded, options and the right one.

   find(app, signal) -> {options: [{value, label}], answer, values, proof, see}
   `values` fill the words KEY.ask and KEY.tell; `proof` shows the numbers; `see` is where to look. */

import { bars } from "../parts/bars.js";
import { el } from "../parts/dom.js";
import { brief, percent } from "../parts/numbers.js";
import { plain, visible } from "../parts/tokens.js";
import { traceRequest } from "../state.js";

const piece = (token) => el("span", { class: "piece" }, visible(token));
const numbers = (values) => values.map((value) => ({ value, label: String(value) }));
const last = (list) => list[list.length - 1];

/** Rows of {label, value} as bars. */
function chart(app, label, rows, text = percent) {
  const list = bars(app, { label, heading: [label, app.t("value")] });
  list.show(rows.map((row) => ({ ...row, text: text(row.value) })));
  return list.root;
}

function distinct(answer, others) {
  return [...new Set([answer, ...others])].slice(0, 4).sort((a, b) => a - b);
}

const tokens = {
  key: "tokens", view: "tokens",
  async find(app) {
    const { tokens: all } = app.trace;
    const text = all.map((token) => token.text).join("");
    const words = text.split(/\s+/).filter(Boolean).length;
    const letters = [...text].length;
    const n = all.length;
    return { answer: n, options: numbers(distinct(n, [words, letters, n + 3, n * 2])),
      values: { n, words, letters } };
  },
};

const next = {
  key: "next", view: "next",
  async find(app) {
    const top = app.trace.next.top.slice(0, 4);
    const options = top.slice().sort((a, b) => a.id - b.id)
      .map((token) => ({ value: token.id, label: piece(token) }));
    return { answer: top[0].id, options, values: { token: plain(top[0]), p: percent(top[0].p) },
      proof: chart(app, app.t("probability"), top.map((token) => ({ label: visible(token),
        value: token.p }))) };
  },
};

const looks = {
  key: "looks", view: "attention",
  async find(app, signal) {
    const { layer, head, position } = app;
    const { data, shape } = await app.api.tensor(`blocks.${layer}.pattern`, { head }, signal);
    const row = Array.from(data.subarray(position * shape[1], position * shape[1] + position + 1));
    const best = row.indexOf(Math.max(...row));
    const some = [...new Set([best, 0, position, Math.max(0, position - 1), position >> 1])]
      .slice(0, 4).sort((a, b) => a - b);
    const label = (s) => el("span", null, `${s} `, piece(app.trace.tokens[s]));
    const order = row.map((value, s) => ({ value, label: label(s) }))
      .sort((a, b) => b.value - a.value).slice(0, 6);
    return { answer: best, options: some.map((s) => ({ value: s, label: label(s) })),
      values: { layer, head, position, token: plain(app.trace.tokens[position]),
        best: plain(app.trace.tokens[best]), p: percent(row[best]) },
      proof: chart(app, app.t("share"), order) };
  },
};

const future = {
  key: "future", view: "attention",
  async find(app, signal) {
    const { layer, head } = app;
    const { data, shape: [T, S] } = await app.api.tensor(`blocks.${layer}.pattern`, { head }, signal);
    let ahead = 0;
    for (let t = 0; t < T; t++) for (let s = t + 1; s < S; s++) ahead += data[t * S + s];
    return { answer: "none", options: ["all", "some", "none"].map((value) => ({ value,
      label: app.t(`future.${value}`) })), values: { sum: brief(ahead) },
    see: { view: "attention", stage: "masked_scores" } };
  },
};

const sink = {
  key: "sink", view: "attention",
  async find(app, signal) {
    const { shape: [L, H, side], data } = await app.api.maps(signal);
    let sum = 0;
    for (let map = 0; map < L * H; map++) {
      for (let r = 1; r < side; r++) sum += data[map * side * side + r * side];
    }
    const share = sum / (255 * L * H * Math.max(1, side - 1));
    const bands = [[0, 0.1], [0.1, 0.25], [0.25, 0.5], [0.5, 1.01]];
    const answer = bands.findIndex(([from, to]) => share >= from && share < to);
    return { answer, options: bands.map(([from, to], value) => ({ value,
      label: `${Math.round(100 * from)}–${Math.round(100 * Math.min(1, to))} %` })),
    values: { p: percent(share) }, see: { view: "attention", stage: "pattern" } };
  },
};

const lens = {
  key: "lens", view: "lens",
  async find(app, signal) {
    const { rows, final } = await app.api.ofTrace("lens?k=1", signal);
    const says = rows.map(({ positions }) => last(positions).top[0]);
    let first = rows.length - 1;
    while (first > 0 && says[first - 1].id === last(final)) first--;
    const name = (i) => (i === 0 ? app.t("embedding") : app.t("afterBlock", { n: i - 1 }));
    const n = rows.length - 1;
    const some = distinct(first, [0, n, n >> 1, Math.max(0, n - 1)]);
    return { answer: first, options: some.map((value) => ({ value, label: name(value) })),
      values: { when: name(first), token: plain(says[n]) },
      proof: el("ol", { class: "says" }, says.map((token, i) => el("li", null, `${name(i)} `,
        piece(token), ` ${percent(token.p)}`))) };
  },
};

const surprise = {
  key: "surprise", view: "loss",
  async find(app, signal) {
    const { loss, mean } = await app.api.ofTrace("loss", signal);
    const known = loss.map((value, at) => ({ value, at })).filter(({ value }) => value !== null);
    if (!known.length) return { answer: 0, options: [{ value: 0, label: "–" }], values: {
      token: "–", loss: "–", mean: "–" } };
    const order = known.slice().sort((a, b) => b.value - a.value);
    const some = [...new Set([order[0], order[order.length - 1], order[order.length >> 1],
      order[order.length >> 2]])].sort((a, b) => a.at - b.at);
    const label = (at) => el("span", null, `${at} `, piece(app.trace.tokens[at]));
    return { answer: order[0].at, options: some.map(({ at }) => ({ value: at, label: label(at) })),
      values: { token: plain(app.trace.tokens[order[0].at]), loss: brief(order[0].value, 3),
        mean: brief(mean, 3) },
      proof: chart(app, app.t("value"), order.slice(0, 6).map(({ at, value }) => ({ label: label(at),
        value })), brief) };
  },
};

const off = {
  key: "off", view: "experiments",
  async find(app, signal) {
    const L = app.model.config.n_layer;
    const some = [...new Set([0, L >> 1, L - 1])];
    const losses = [];
    for (const layer of some) { // one at a time: each is a whole pass
      const request = { ...traceRequest(app.state), off: [...app.state.off, String(layer)] };
      const { trace } = await app.api.trace(request, { shown: false, signal });
      losses.push((await app.api.get(`trace/${trace}/loss`, signal)).mean ?? 0);
    }
    const { mean } = await app.api.ofTrace("loss", signal);
    const worst = some[losses.indexOf(Math.max(...losses))];
    return { answer: worst, options: some.map((n) => ({ value: n, label: app.t("block", { n }) })),
      values: { n: worst, before: brief(mean, 3), after: brief(Math.max(...losses), 3) },
      proof: chart(app, app.t("value"), some.map((n, i) => ({ value: losses[i],
        label: app.t("block", { n }) })), brief),
      see: { view: "experiments", off: [String(worst)] } };
  },
};

export const QUESTIONS = [tokens, next, looks, future, sink, lens, surprise, off];
