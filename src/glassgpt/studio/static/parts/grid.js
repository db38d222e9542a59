/* All heads: rows are layers, columns are heads, each a small map of which token attends to which.

   const grid = headGrid(app, {onpick}); root.append(grid.root); grid.show(maps, layer, head)
   One canvas; its table says of every head in words what it mostly looks at. Knows no server. */

import { asTable } from "./as_table.js";
import { scaleOf, voidColour } from "./colours.js";
import { css, el } from "./dom.js";

const GAP = 3;
const LARGEST = 104; // pixels of one map

/** `maps`: {shape: [L, H, side, side], data: Uint8Array}, shares x 255. */
export function headGrid(app, { onpick }) {
  const { t } = app;
  const canvas = el("canvas", { tabindex: "0", role: "application",
    "aria-label": `${t("grid")}. ${t("grid.help")}` });
  const readout = el("p", { class: "readout", role: "status" });
  const table = el("div", { class: "scroll", tabindex: "0", role: "region",
    "aria-label": `${t("grid")}: ${t("asTable")}` });
  const kind = asTable(app, t("grid"));
  const root = el("div", { class: "picture" }, el("div", { class: "bar-above" }, kind.root), canvas,
    table, readout);
  let maps = null;
  let at = [0, 0];
  let tile = 0;
  let left = 0;

  function draw() {
    if (!maps) return;
    canvas.hidden = app.state.table;
    table.hidden = !app.state.table;
    kind.update();
    if (app.state.table) drawTable();
    else drawTiles();
    say(at);
  }

  function drawTiles() {
    const [L, H, side] = maps.shape;
    left = 26;
    const room = (root.clientWidth || 600) - left;
    tile = Math.max(8, Math.min(LARGEST, Math.floor(room / H) - GAP));
    const [width, height] = [left + H * (tile + GAP), 16 + L * (tile + GAP)];
    const sharp = devicePixelRatio || 1;
    Object.assign(canvas, { width: width * sharp, height: height * sharp });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    const ink = canvas.getContext("2d");
    ink.scale(sharp, sharp);
    ink.imageSmoothingEnabled = tile < side;
    ink.font = `12px ${css("--mono")}`;
    ink.textBaseline = "middle";
    const colours = palette();
    for (let l = 0; l < L; l++) {
      ink.fillStyle = css("--soft");
      ink.textAlign = "right";
      ink.fillText(l, left - 6, 16 + l * (tile + GAP) + tile / 2);
      for (let h = 0; h < H; h++) {
        const [x, y] = [left + h * (tile + GAP), 16 + l * (tile + GAP)];
        ink.drawImage(small(maps, l, h, colours), x, y, tile, tile);
        if (l === 0 && (tile > 18 || h % 4 === 0)) {
          ink.fillStyle = css("--soft");
          ink.textAlign = "center";
          ink.fillText(h, x + tile / 2, 8);
        }
      }
    }
    ink.lineWidth = 2.5;
    ink.strokeStyle = css("--more");
    ink.strokeRect(left + at[1] * (tile + GAP) - 1, 16 + at[0] * (tile + GAP) - 1, tile + 2,
      tile + 2);
  }

  function drawTable() {
    const [L, H] = maps.shape;
    const heads = Array.from({ length: H }, (_, h) => h);
    table.replaceChildren(el("table", { class: "values heads" },
      el("thead", null, el("tr", null, el("td"), heads.map((h) =>
        el("th", { scope: "col" }, `${t("head")} ${h}`)))),
      el("tbody", null, Array.from({ length: L }, (_, l) => el("tr", null,
        el("th", { scope: "row" }, `${t("layer")} ${l}`), heads.map((h) => el("td", {
          class: l === at[0] && h === at[1] && "now" },
        el("button", { type: "button", class: "plain", "data-layer": l, "data-head": h,
          onclick: () => onpick(l, h) }, habit(l, h)))))))));
  }

  /** What the head mostly looks at, in a word. It is exact for texts that fit the map. */
  function habit(l, h) {
    const side = maps.shape[2];
    const from = (l * maps.shape[1] + h) * side * side;
    const sums = { first: 0, self: 0, before: 0 };
    for (let r = 2; r < side; r++) {
      const row = from + r * side;
      sums.first += maps.data[row];
      sums.self += maps.data[row + r];
      sums.before += maps.data[row + r - 1];
    }
    const [name, sum] = Object.entries(sums).sort((a, b) => b[1] - a[1])[0];
    return t(`habit.${sum > 0.4 * 255 * Math.max(1, side - 2) ? name : "spread"}`);
  }

  function say([l, h]) {
    readout.textContent = t("grid.at", { layer: l, head: h, habit: habit(l, h) });
  }

  function under(event) {
    const box = canvas.getBoundingClientRect();
    const l = Math.floor((event.clientY - box.top - 16) / (tile + GAP));
    const h = Math.floor((event.clientX - box.left - left) / (tile + GAP));
    const [L, H] = maps.shape;
    return l >= 0 && l < L && h >= 0 && h < H ? [l, h] : null;
  }

  canvas.addEventListener("pointermove", (event) => {
    const found = maps && under(event);
    if (found) say(found);
  });
  canvas.addEventListener("pointerleave", () => maps && say(at));
  canvas.addEventListener("click", (event) => {
    const found = under(event);
    if (found) onpick(...found);
  });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
      ArrowRight: [0, 1] }[event.key];
    if (!by || !maps) return;
    event.preventDefault();
    const [l, h] = at.map((n, i) => Math.max(0, Math.min(maps.shape[i] - 1, n + by[i])));
    onpick(l, h);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - width) > 1) draw();
    width = root.clientWidth;
  }).observe(root);

  return {
    root,
    show(next, layer, head) {
      maps = next;
      at = [layer, head];
      draw();
    },
  };
}

/** Colours of 0 to 255. */
function palette() {
  const colour = scaleOf("share", 1);
  return Array.from({ length: 256 }, (_, n) => colour(n / 255));
}

function small(maps, l, h, colours) {
  const side = maps.shape[2];
  const image = new ImageData(side, side);
  const from = (l * maps.shape[1] + h) * side * side;
  const nothing = voidColour();
  for (let i = 0; i < side * side; i++) {
    const future = i % side > Math.floor(i / side);
    image.data.set([...(future ? nothing : colours[maps.data[from + i]]), 255], 4 * i);
  }
  const drawn = new OffscreenCanvas(side, side);
  drawn.getContext("2d").putImageData(image, 0, 0);
  return drawn;
}
