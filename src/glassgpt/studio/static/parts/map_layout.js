/* Where the operations of a model are on the map. Only numbers; views/map.js draws them.

   layOut(model, openLayer, width) -> [{key, operation, lane, left, width, y, height, ...}]
   Lane 0 is the residual stream, lane 1 what a block computes beside it. */

const HEIGHT = 25;
const GAP = 13;
const STREAM = 46; // x of the stream
const PLAIN = {
  embedding: "embedding", linear: "linear", layer_norm: "norm", rms_norm: "norm",
  matmul: "matmul", softmax: "softmax", masked_fill: "mask", div: "÷", mul: "×", add: "+",
  __getitem__: "take", __invert__: "not", repeat_interleave: "repeat", cross_entropy: "loss",
};

export function layOut(model, openLayer, width) {
  const narrow = width < 440;
  const items = [];
  let y = 12;
  const place = (item) => {
    items.push({ ...item, y, height: item.height ?? HEIGHT });
    y += (item.height ?? HEIGHT) + GAP;
  };
  const outside = model.operations.map((operation, i) => ({ operation, i }));
  const first = outside.findIndex(({ operation }) => operation.layer !== null);
  const head = outside.slice(0, first);
  const block = outside.filter(({ operation }) => operation.layer !== null);
  const tail = outside.slice(first).filter(({ operation }) => operation.layer === null);
  const onStream = ({ operation, i }) => place(streamItem(operation, `m.${i}`, narrow));
  head.forEach(onStream);
  for (let layer = 0; layer < model.config.n_layer; layer++) {
    if (layer !== openLayer) place({ key: `b.${layer}`, kind: "block", closed: true, layer, lane: 0,
      x: STREAM, half: 0, left: STREAM - 36, width: narrow ? 160 : 240, height: 22 });
    else block.forEach(({ operation }, k) => place(blockItem(operation, `0.${k}`, layer, narrow)));
  }
  tail.forEach(onStream);
  return items;
}

const isAdd = (operation) => operation.name === "add"
  && /resid_(mid|post)$/.test(operation.activation ?? "");

function streamItem(operation, key, narrow) {
  return { key, operation, kind: "whole", part: "outside", lane: 0, layer: 0, x: STREAM, half: 0,
    left: STREAM - 36, width: narrow ? 160 : 240, text: textOf(operation, narrow), shapeX: narrow ? 206 : 262,
    short: narrow };
}

function blockItem(operation, key, layer, narrow) {
  if (isAdd(operation)) {
    return { key, operation, kind: "add", part: "stream", lane: 0, layer, x: STREAM, half: 13,
      left: STREAM - 13, width: HEIGHT, text: "+", shapeX: narrow ? 206 : 262,
      short: narrow };
  }
  const left = narrow ? 78 : 96;
  const width = narrow ? 118 : 154;
  return { key, operation, kind: "step", part: partOf(operation), lane: 1, layer, left, width,
    middle: left + width / 2, x: left, half: 0, text: textOf(operation, narrow),
    shapeX: narrow ? 206 : 262, short: narrow };
}

function partOf(operation) {
  const name = `${operation.name} ${operation.activation ?? ""}`;
  if (/norm/.test(operation.name)) return "norm";
  if (/mlp|gelu|relu|silu/.test(name)) return "mlp";
  return "attn";
}

/** The label of an operation: its name, with a mathematical sign if it has one. */
function textOf(operation, narrow) {
  const [name, weights] = operation.name.split(" ");
  const plain = PLAIN[name] ?? name;
  if (!weights) return plain;
  return narrow ? weights.replace(/^(attn|mlp)\./, "") : `${plain} ${weights}`;
}
