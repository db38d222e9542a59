/* A matrix as a picture: pointer and arrow keys read its cells, Enter picks one, plus and minus zoom.
   The same as a table, where every cell carries its exact value.

   const picture = heatmap(app, {label, onpick}); root.append(picture.root);
   picture.show({name, data, shape: [rows, columns], scale: "diverging", index: (r, c) => [r, c],
     rowLabel: (r) => "..", columnLabel: (c) => ".."})
   Optional: masked(r, c, value) (default: -inf); most (end of the scale; default: the largest);
   square; cursor [r, c]; origin [r, c] when `data` is a window of a larger tensor.
   Whether tables are shown is `state.table`, the same for all pictures. Knows no server. */

import { asTable } from "./as_table.js";
import { gradient, scaleOf, voidColour } from "./colours.js";
import { css, el } from "./dom.js";
import { tableOf } from "./matrix_table.js";
import { brief } from "./numbers.js";

const TALLEST = 560; // pixels: largest height of a whole picture
const LARGEST_CELL = 30;
const SMALLEST_LABELLED = 12; // pixels: smaller cells get no label

export function heatmap(app, { label, onpick }) {
  const { t } = app;
  const canvas = el("canvas", { tabindex: "0", role: "application", "aria-label":
    `${label}. ${t("pictureHelp")}` });
  const readout = el("p", { class: "readout", role: "status" });
  const table = el("div", { class: "scroll", tabindex: "0", role: "region",
    "aria-label": `${label}: ${t("asTable")}` });
  const scaleBar = el("span", { class: "legend", "aria-hidden": "true" });
  const above = el("div", { class: "bar-above" });
  const root = el("div", { class: "picture" }, above, canvas, table, readout);
  let shown = null; // the argument of show()
  let cursor = [0, 0];
  let view = null; // {r, c, rows, columns}: the part that is drawn
  let layout = null; // where the cells lie on the canvas

  const isMasked = (r, c) => {
    const value = shown.data[r * shown.shape[1] + c];
    return shown.masked ? shown.masked(r, c, value) : value === -Infinity;
  };
  const valueAt = (r, c) => shown.data[r * shown.shape[1] + c];

  function draw() {
    if (!shown) return;
    canvas.hidden = app.state.table;
    table.hidden = !app.state.table;
    drawAbove();
    if (app.state.table) drawTable();
    else drawPicture();
    say(cursor);
  }

  const kind = asTable(app, label);
  const button = (text, name, factor) => el("button", { type: "button", "aria-label": name,
    onclick: () => zoom(factor) }, text);
  const [out, whole] = [button("−", t("zoomOut"), 2), button(t("zoomAll"), t("zoomAll"), null)];
  const zooms = el("span", null, button("+", t("zoomIn"), 0.5), " ", out, " ", whole);
  above.append(kind.root, zooms, scaleBar);

  function drawAbove() {
    out.disabled = whole.disabled = view.rows >= shown.shape[0] && view.columns >= shown.shape[1];
    zooms.hidden = app.state.table || Math.max(...shown.shape) <= 8;
    kind.update();
    scaleBar.replaceChildren(shown.scale === "share" ? "0" : brief(-shown.most, 3),
      el("i", { style: `background:${gradient(shown.scale, shown.most)}` }),
      brief(shown.most, 3));
  }

  function drawTable() {
    table.replaceChildren(...tableOf(app, shown, view, cursor, isMasked, (r, c) => {
      cursor = [r, c];
      onpick?.(r, c);
      draw();
    }));
  }

  function drawPicture() {
    const room = root.clientWidth || 600;
    const ink = canvas.getContext("2d");
    layout = layoutOf(shown, view, room, ink);
    const { left, top, cellWidth, cellHeight, width, height } = layout;
    const sharp = devicePixelRatio || 1;
    Object.assign(canvas, { width: width * sharp, height: height * sharp });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    ink.scale(sharp, sharp);
    ink.imageSmoothingEnabled = false;
    ink.drawImage(pixels(shown, view, isMasked), left, top, view.columns * cellWidth,
      view.rows * cellHeight);
    drawLabels(ink, shown, view, layout);
    drawCursor(ink);
  }

  function drawCursor(ink) {
    const [r, c] = cursor;
    if (r < view.r || r >= view.r + view.rows || c < view.c || c >= view.c + view.columns) return;
    const { left, top, cellWidth, cellHeight } = layout;
    const [x, y] = [left + (c - view.c) * cellWidth, top + (r - view.r) * cellHeight];
    ink.lineWidth = 2;
    ink.strokeStyle = css("--ink");
    ink.strokeRect(x - 0.5, y - 0.5, Math.max(5, cellWidth) + 1, Math.max(5, cellHeight) + 1);
  }

  function say([r, c]) {
    const value = isMasked(r, c) ? t("masked") : brief(valueAt(r, c), 5);
    readout.textContent = t("cellAt", { row: shown.rowLabel(r), column: shown.columnLabel(c),
      value });
  }

  // -- pointer and keys ------------------------------------------------------------------------

  function cellUnder(event) {
    const at = canvas.getBoundingClientRect();
    const c = view.c + Math.floor((event.clientX - at.left - layout.left) / layout.cellWidth);
    const r = view.r + Math.floor((event.clientY - at.top - layout.top) / layout.cellHeight);
    const inside = r >= view.r && r < view.r + view.rows && c >= view.c
      && c < view.c + view.columns;
    return inside ? [r, c] : null;
  }

  canvas.addEventListener("pointermove", (event) => {
    const cell = layout && cellUnder(event);
    if (cell) say(cell);
  });
  canvas.addEventListener("pointerleave", () => shown && say(cursor));
  canvas.addEventListener("click", (event) => {
    const cell = cellUnder(event);
    if (!cell) return;
    cursor = cell;
    draw();
    onpick?.(...cell);
  });

  canvas.addEventListener("keydown", (event) => {
    if (!shown || event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 10 : 1;
    const by = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far],
      ArrowRight: [0, far] }[event.key];
    if (by) move(by);
    else if (event.key === "Home") move([0, -Infinity]);
    else if (event.key === "End") move([0, Infinity]);
    else if (event.key === "Enter" || event.key === " ") onpick?.(...cursor);
    else if (event.key === "+" || event.key === "=") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else if (event.key === "0") zoom(null);
    else return;
    event.preventDefault();
  });

  function move(by) {
    cursor = cursor.map((at, i) => Math.max(0, Math.min(shown.shape[i] - 1, at + by[i])));
    follow();
    draw();
  }

  function zoom(factor) {
    const [rows, columns] = shown.shape;
    if (factor === null) view = { r: 0, c: 0, rows, columns };
    else {
      view.rows = Math.max(Math.min(4, rows), Math.min(rows, Math.ceil(view.rows * factor)));
      view.columns = Math.max(Math.min(4, columns),
        Math.min(columns, Math.ceil(view.columns * factor)));
      view.r = cursor[0] - (view.rows >> 1);
      view.c = cursor[1] - (view.columns >> 1);
      follow();
    }
    draw();
  }

  /** Keeps the drawn part inside the matrix and around the cursor. */
  function follow() {
    const keep = (from, size, all, at) => Math.max(0, Math.min(all - size,
      at < from ? at : at >= from + size ? at - size + 1 : from));
    view.r = keep(view.r, view.rows, shown.shape[0], cursor[0]);
    view.c = keep(view.c, view.columns, shown.shape[1], cursor[1]);
  }

  let width = 0;
  new ResizeObserver(() => {
    if (shown && Math.abs(root.clientWidth - width) > 1) draw();
    width = root.clientWidth;
  }).observe(root);

  return {
    root,
    get cursor() { return cursor; },
    show(next) {
      const fresh = !shown || shown.name !== next.name || String(shown.shape) !== String(next.shape);
      const most = next.most ?? largest(next.data);
      const given = { index: (r, c) => [r, c], origin: [0, 0], ...next, most };
      shown = { ...given, ownCursor: undefined };
      const [rows, columns] = next.shape;
      if (fresh) view = { r: 0, c: 0, rows, columns };
      if (next.cursor) cursor = next.cursor;
      cursor = cursor.map((at, i) => Math.max(0, Math.min(next.shape[i] - 1, at)));
      follow();
      draw();
    },
  };
}

/** The largest absolute value of the finite numbers. */
export function largest(data) {
  let most = 0;
  for (const value of data) {
    const size = Math.abs(value);
    if (size > most && size < Infinity) most = size;
  }
  return most || 1;
}

/** One pixel per cell, which the browser enlarges. */
function pixels(shown, view, isMasked) {
  const image = new ImageData(view.columns, view.rows);
  const colour = scaleOf(shown.scale, shown.most);
  const nothing = voidColour();
  let at = 0;
  for (let r = view.r; r < view.r + view.rows; r++) {
    for (let c = view.c; c < view.c + view.columns; c++) {
      const value = shown.data[r * shown.shape[1] + c];
      const [red, green, blue] = isMasked(r, c) || Number.isNaN(value) ? nothing : colour(value);
      image.data.set([red, green, blue, 255], at);
      at += 4;
    }
  }
  const small = new OffscreenCanvas(view.columns, view.rows);
  small.getContext("2d").putImageData(image, 0, 0);
  return small;
}

function layoutOf(shown, view, room, ink) {
  ink.font = labelFont();
  const widest = Math.min(110, Math.max(...range(view.r, view.rows, 200).map((r) =>
    ink.measureText(shown.rowLabel(r)).width)) + 10);
  const longest = Math.min(90, Math.max(...range(view.c, view.columns, 200).map((c) =>
    ink.measureText(shown.columnLabel(c)).width)) + 8);
  let cellWidth = Math.min(LARGEST_CELL, (room - widest) / view.columns);
  let cellHeight = Math.min(LARGEST_CELL, TALLEST / view.rows);
  if (shown.square) cellWidth = cellHeight = Math.min(cellWidth, cellHeight);
  const left = cellHeight >= SMALLEST_LABELLED ? widest : 0;
  if (!left && !shown.square) cellWidth = Math.min(LARGEST_CELL, room / view.columns);
  const top = cellWidth >= SMALLEST_LABELLED ? longest : 0;
  return { left, top, cellWidth, cellHeight, width: left + cellWidth * view.columns + 2,
    height: top + cellHeight * view.rows + 2 };
}

const range = (from, n, most) => Array.from({ length: Math.min(n, most) }, (_, i) => from + i);
const labelFont = () => `12px ${css("--mono")}`;

function drawLabels(ink, shown, view, { left, top, cellWidth, cellHeight }) {
  ink.font = labelFont();
  ink.fillStyle = css("--soft");
  ink.textBaseline = "middle";
  ink.textAlign = "right";
  if (left) {
    for (let i = 0; i < view.rows; i++) {
      ink.fillText(shown.rowLabel(view.r + i), left - 6, top + (i + 0.5) * cellHeight, left - 6);
    }
  }
  ink.textAlign = "left";
  if (top) {
    for (let i = 0; i < view.columns; i++) {
      ink.save();
      ink.translate(left + (i + 0.5) * cellWidth, top - 4);
      ink.rotate(-Math.PI / 2);
      ink.fillText(shown.columnLabel(view.c + i), 0, 0, top - 4);
      ink.restore();
    }
  }
}
