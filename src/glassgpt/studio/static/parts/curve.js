/* Lines over steps, as SVG with a table beside it: losses while a model learns.

   const chart = curve(app, {label, onpick}); root.append(chart.root);
   chart.show({series: [{name, kind, points: [[x, y], ...]}], level: {y, name}, now: 300}) */

import { asTable } from "./as_table.js";
import { el, svg } from "./dom.js";
import { brief, count } from "./numbers.js";

const HEIGHT = 280;
const EDGE = { left: 46, right: 14, top: 14, bottom: 34 };

export function curve(app, { label, onpick }) {
  const { t } = app;
  const drawing = el("div");
  const table = el("div", { class: "scroll", tabindex: "0", role: "region",
    "aria-label": `${label}: ${t("asTable")}` });
  const readout = el("p", { class: "readout", role: "status" });
  const kind = asTable(app, label);
  const root = el("div", { class: "picture curve" }, el("div", { class: "bar-above" }, kind.root),
    drawing, table, readout);
  let shown = null;

  function draw() {
    if (!shown) return;
    drawing.hidden = app.state.table;
    table.hidden = !app.state.table;
    kind.update();
    if (app.state.table) table.replaceChildren(tableOf(app, shown.series));
    else drawing.replaceChildren(picture());
  }

  function picture() {
    const width = Math.max(260, root.clientWidth || 600);
    const xs = shown.series.flatMap(({ points }) => points.map(([x]) => x));
    const ys = shown.series.flatMap(({ points }) => points.map(([, y]) => y)).filter(Number.isFinite);
    const last = Math.max(1, ...xs);
    const [low, high] = [Math.min(...ys), Math.max(...ys, shown.level?.y ?? -Infinity)];
    const pad = 0.05 * (high - low || 1);
    const x = (step) => EDGE.left + (step / last) * (width - EDGE.left - EDGE.right);
    const y = (loss) => EDGE.top + ((high + pad - loss) / (high - low + 2 * pad))
      * (HEIGHT - EDGE.top - EDGE.bottom);
    const image = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
      "aria-label": label },
    ticks(low, high, 4).map((value) => [svg("line", { class: "rule", x1: EDGE.left,
      x2: width - EDGE.right, y1: y(value), y2: y(value) }), svg("text", { x: EDGE.left - 6,
      y: y(value), class: "left" }, brief(value, 3))]),
    ticks(0, last, width > 500 ? 6 : 3).map((value) => svg("text", { x: x(value), y: HEIGHT - 12,
      class: "under-axis" }, count(value))),
    shown.level && [svg("line", { class: "level", x1: EDGE.left, x2: width - EDGE.right,
      y1: y(shown.level.y), y2: y(shown.level.y) }), svg("text", { x: width - EDGE.right,
      y: y(shown.level.y) + 14, class: "right" }, shown.level.name)],
    shown.now !== null && shown.now !== undefined && svg("line", { class: "now-line",
      x1: x(shown.now), x2: x(shown.now), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
    shown.series.map(({ kind, points }) => svg("path", { class: `series ${kind}`, d: points.map(
      ([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("") })));
    const stepUnder = (event) => {
      const box = image.getBoundingClientRect();
      const at = (event.clientX - box.left - EDGE.left) / (width - EDGE.left - EDGE.right);
      return Math.max(0, Math.min(1, at)) * last;
    };
    image.addEventListener("pointermove", (event) => say(stepUnder(event)));
    image.addEventListener("click", (event) => onpick?.(stepUnder(event)));
    return image;
  }

  function say(step) {
    readout.textContent = shown.series.filter(({ points }) => points.length).map(({ name, points }) => {
      const near = points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      return `${name} ${t("step", { n: count(near[0]) })}: ${brief(near[1])}`;
    }).join(" · ");
  }

  let width = 0;
  const watch = new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - width) > 1) draw();
    width = root.clientWidth;
  });
  watch.observe(root);
  return {
    root,
    show(next) {
      shown = next;
      draw();
      say(Math.max(0, ...shown.series.flatMap(({ points }) => points.map(([x]) => x))));
    },
  };
}

/** About `n` round numbers from `low` to `high`. */
function ticks(low, high, n) {
  const rough = (high - low || 1) / n;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * unit).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) {
    found.push(Number(value.toPrecision(10)));
  }
  return found;
}

function tableOf(app, series) {
  const steps = [...new Set(series.flatMap(({ points }) => points.map(([x]) => x)))];
  const at = series.map(({ points }) => new Map(points));
  return el("table", { class: "values" },
    el("thead", null, el("tr", null, el("th", { scope: "col" }, app.t("curve.step")),
      series.map(({ name }) => el("th", { scope: "col" }, name)))),
    el("tbody", null, steps.sort((a, b) => a - b).map((step) => el("tr", null,
      el("th", { scope: "row" }, count(step)), at.map((values, i) => el("td", {
        "data-name": series[i].kind, "data-index": step, "data-value": values.get(step) },
      values.has(step) ? brief(values.get(step)) : ""))))));
}
