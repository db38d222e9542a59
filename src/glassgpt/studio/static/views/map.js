/* The map: the whole model, operation by operation, drawn from what the server saw it compute.

   The residual stream runs down on the left. What a block computes is drawn beside it and comes
   back in an addition. Every arrow shows the present shape; the panel shows lines of model.py. */

import { el, svg } from "../parts/dom.js";
import { about, count } from "../parts/numbers.js";
import { meaning, shape, sizeOf } from "../parts/shape.js";
import { explain } from "../parts/tip.js";
import { code } from "../parts/code.js";
import { layOut } from "../parts/map_layout.js";
import words from "./map_words.js";

export default {
  key: "map",
  title: { en: "Map", zh: "模型地图" },
  intro: {
    en: "Everything that this model does, from token ids to logits. Each arrow shows the shape of "
      + "what flows there now; point at a letter to read its meaning. Point at an operation, or "
      + "move with the arrow keys, to read the lines of code that compute it.",
    zh: "这个模型所做的一切，从词元编号到 logits。每个箭头上是此刻流过的张量形状，字母可以悬停查看含义。"
      + "指向一个操作，或用方向键移动，即可看到计算它的那几行代码。",
  },
  words,
  state: { operation: "" },
  alone: true,

  mount(root, app) {
    const { t } = app;
    const drawing = el("div", { class: "drawing" });
    const side = el("section", { class: "panel side", "aria-label": t("operation"),
      "aria-live": "polite" });
    root.append(el("div", { class: "map" }, el("section", { class: "panel", "aria-label":
      t("drawing") }, drawing), side));
    let width = 0;
    let items = [];

    function draw() {
      width = drawing.clientWidth;
      if (!width) return;
      const focused = drawing.contains(document.activeElement);
      items = layOut(app.model, app.layer, width);
      const at = current();
      drawing.replaceChildren(picture(app, items, width, at, choose, look));
      showSide(app, side, items[at]);
      if (focused) drawing.querySelector('[tabindex="0"]')?.focus();
    }

    const current = () => Math.max(0, items.findIndex((item) => item.key === app.state.operation));

    function choose(i) {
      if (items[i].layer !== undefined && items[i].closed) {
        return app.set({ layer: items[i].layer, operation: "0.0" }, { replace: true });
      }
      return app.set({ operation: items[i].key }, { replace: true });
    }

    /** What the pointer passes over is shown, without being chosen. */
    const look = (i) => !items[i].closed && showSide(app, side, items[i]);
    drawing.addEventListener("pointerleave", () => look(current()));

    drawing.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      let at = current();
      do at += by; while (items[at]?.closed);
      if (items[at]) choose(at);
    });
    const watch = new ResizeObserver(() => drawing.clientWidth !== width && draw());
    watch.observe(drawing);
    return { update: draw, leave: () => watch.disconnect() };
  },
};

// -- the drawing ---------------------------------------------------------------------------------

function picture(app, items, width, at, choose, look) {
  const last = items.at(-1);
  const height = last.y + last.height + 16;
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": app.t("drawing") },
  wires(items), items.map((item, i) => node(app, item, i === at, () => choose(i), () => look(i))));
}

/** The line of the residual stream, and a way out and back for the branches of each block. */
function wires(items) {
  const paths = [];
  const stream = items.filter((item) => item.lane === 0);
  for (let i = 1; i < stream.length; i++) {
    const [a, b] = [stream[i - 1], stream[i]];
    paths.push(arrow(`M${a.x} ${a.y + a.height} V${b.y - 2}`, "stream"));
  }
  items.forEach((item, i) => {
    if (item.lane === 0 || item.closed) return;
    const before = items[i - 1];
    if (before.lane === 0) {
      const y = before.y + before.height + 8;
      paths.push(arrow(`M${before.x} ${y} H${item.middle} V${item.y - 2}`, "branch"));
    } else {
      paths.push(arrow(`M${item.middle} ${before.y + before.height} V${item.y - 2}`, "branch"));
    }
    const after = items[i + 1];
    if (after?.lane === 0) {
      const y = after.y + after.height / 2;
      paths.push(arrow(`M${item.middle} ${item.y + item.height} V${y} H${after.x + after.half + 3}`,
        "branch"));
    }
  });
  return [svg("defs", null, svg("marker", { id: "tip-arrow", viewBox: "0 0 8 8", refX: 7, refY: 4,
    markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" },
  svg("path", { d: "M0 0 L8 4 L0 8 z", class: "point" }))), ...paths];
}

const arrow = (d, kind) => svg("path", { d, class: `wire ${kind}`, "marker-end": "url(#tip-arrow)" });

function node(app, item, chosen, onclick, onpointerenter) {
  const { t } = app;
  if (item.kind === "block") return blockBar(app, item, onclick);
  const box = svg("rect", { x: item.left, y: item.y, width: item.width, height: item.height,
    rx: item.kind === "add" ? item.height / 2 : 7 });
  const label = svg("text", { x: item.left + item.width / 2, y: item.y + item.height / 2,
    class: "name" }, item.kind === "add" ? "+" : item.text);
  const sizes = item.operation.symbols.map((symbol) => sizeOf(symbol, app.model.config,
    tokensOf(app)) ?? "?");
  const group = svg("g", { class: `op ${item.kind} ${item.part}${chosen ? " chosen" : ""}`,
    role: "button", tabindex: chosen ? 0 : -1, "data-operation": item.key,
    "data-shape": sizes.join(","), "aria-pressed": String(chosen), "aria-label":
      t("opLabel", { name: item.operation.name, shape: item.operation.symbols.join(", ") }),
    onclick, onpointerenter, onkeydown: (event) =>
      (event.key === "Enter" || event.key === " ") && onclick() }, box, label);
  return [group, shapeOn(app, item, sizes)];
}

/** The shape on the arrow that leaves an operation; each letter has a tooltip. */
function shapeOn(app, item, sizes) {
  const { symbols, activation } = item.operation;
  const middle = item.y + item.height / 2;
  const text = svg("text", { x: item.shapeX, y: item.short ? middle - 6 : middle,
    class: "sizes-on" });
  text.append("(");
  symbols.forEach((symbol, i) => {
    if (i) text.append(", ");
    const letter = svg("tspan", { class: "letter" }, symbol);
    explain(letter, () => meaning(app, symbol));
    text.append(letter);
  });
  text.append(") ");
  text.append(svg("tspan", item.short ? { x: item.shapeX, dy: 12 } : null, sizes.join("×")));
  if (activation && !item.short) {
    text.append(svg("tspan", { class: "called", dx: 8 }, activation.replace(/^blocks\.\d+\./, "")));
  }
  return text;
}

function blockBar(app, item, onclick) {
  const words = app.t("block", { n: item.layer });
  return svg("g", { class: "op block", role: "button", tabindex: 0, "aria-label":
    app.t("openBlock", { n: item.layer }), onclick, onkeydown: (event) =>
    (event.key === "Enter" || event.key === " ") && onclick() },
  svg("rect", { x: item.left, y: item.y, width: item.width, height: item.height, rx: 7 }),
  svg("text", { x: item.left + item.width / 2, y: item.y + item.height / 2, class: "name" }, words));
}

const tokensOf = (app) => app.trace?.tokens.length ?? app.model.context_length;

// -- beside it -----------------------------------------------------------------------------------

function showSide(app, root, { operation, layer }) {
  const { t, model } = app;
  const T = tokensOf(app);
  const numbers = (symbols) => symbols.map((symbol) => sizeOf(symbol, model.config, T) ?? "?");
  const name = operation.activation?.replace(/^blocks\.\d+\./, `blocks.${layer}.`);
  const [first] = operation.name.split(" ");
  const said = t(`op.${first}`, {}, true);
  root.replaceChildren(
    el("h2", null, el("code", null, operation.name)),
    said && el("p", null, said),
    el("dl", null,
      operation.inputs.length ? [el("dt", null, t("in")), el("dd", null, operation.inputs.map((one) =>
        el("div", null, shape(app, one, numbers(one)))))] : [],
      el("dt", null, t("out")), el("dd", null, shape(app, operation.symbols,
        numbers(operation.symbols))),
      el("dt", null, t("weights")), el("dd", null, count(operation.parameters)),
      operation.flops_per_token ? [el("dt", null, t("flops")),
        el("dd", null, about(operation.flops_per_token))] : []),
    name && app.trace && el("p", null, el("button", { type: "button", onclick: () =>
      app.set({ view: "tensor", tensor: name, cell: null }) }, t("seeTensor", { name }))),
    operation.lines[0] > 0 && code(app, model.source, operation.lines));
}
