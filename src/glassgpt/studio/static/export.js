/* Saves the present view as one file that needs nothing else: HTML or PNG.

   await exportHtml(app). Canvases become pictures in the file; where tables are shown instead of
   them, these come along with every exact number. Scripts stay behind. */

import { css } from "./parts/dom.js";

/** The elements of the view as they look now, without controls, which do nothing in a file. */
function frozen() {
  const live = document.getElementById("view");
  const copy = live.cloneNode(true);
  const canvases = live.querySelectorAll("canvas");
  copy.querySelectorAll("canvas").forEach((canvas, i) => {
    const picture = document.createElement("img");
    picture.src = canvases[i].toDataURL("image/png");
    picture.alt = canvas.getAttribute("aria-label") ?? "";
    picture.className = canvas.className;
    picture.style.width = `${canvases[i].clientWidth}px`;
    picture.style.height = `${canvases[i].clientHeight}px`;
    canvas.replaceWith(picture);
  });
  const inputs = live.querySelectorAll("input, textarea, select");
  copy.querySelectorAll("input, textarea, select").forEach((input, i) => {
    const text = document.createElement("b");
    text.textContent = inputs[i].type === "checkbox" ? (inputs[i].checked ? "☑" : "☐")
      : inputs[i].selectedOptions?.[0]?.textContent ?? inputs[i].value;
    input.replaceWith(text);
  });
  copy.querySelectorAll("[tabindex]").forEach((node) => node.removeAttribute("tabindex"));
  return copy;
}

async function styles() {
  const sheets = [...document.querySelectorAll('link[rel="stylesheet"]')];
  const texts = await Promise.all(sheets.map(async (link) => (await fetch(link.href)).text()));
  return texts.join("\n");
}

const escaped = (text) => text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);

export async function exportHtml(app) {
  const { t, state, model } = app;
  const root = document.documentElement;
  const note = t("save.note", { model: model.name, text: state.text });
  const page = `<!doctype html>
<html lang="${root.lang}" data-theme="${root.dataset.theme}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escaped(document.title)}</title>
<style>
${await styles()}
</style>
</head>
<body class="saved">
<main>
${frozen().outerHTML}
<p class="note">${escaped(note)}</p>
</main>
</body>
</html>
`;
  save(new Blob([page], { type: "text/html" }), `${name(app)}.html`);
}

// Characters that a token may contain but XML must not, not even as &#1;
const NOT_XML = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g;

/** Draws the frozen view through an SVG picture onto a canvas. */
export async function exportPng(app) {
  const live = document.getElementById("view");
  const [width, height] = [live.scrollWidth, live.scrollHeight];
  const root = document.documentElement;
  const wrapper = document.createElement("div");
  wrapper.setAttribute("xmlns", "http://www.w3.org/1999/xhtml");
  wrapper.setAttribute("class", "root saved");
  wrapper.dataset.theme = root.dataset.theme;
  const style = document.createElement("style");
  style.textContent = (await styles()).replaceAll(":root", ".root");
  wrapper.append(style, frozen());
  const content = new XMLSerializer().serializeToString(wrapper).replace(NOT_XML, "\ufffd");
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}">`
    + `<foreignObject width="100%" height="100%">${content}</foreignObject></svg>`)}`;
  await picture.decode().catch(() => { throw new Error(app.t("save.failed")); });
  const sharp = Math.min(2, 8000 / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = width * sharp;
  canvas.height = height * sharp;
  const ink = canvas.getContext("2d");
  ink.fillStyle = css("--paper");
  ink.fillRect(0, 0, canvas.width, canvas.height);
  ink.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (!blob) throw new Error(app.t("save.failed"));
  save(blob, `${name(app)}.png`);
}

const name = (app) => `glassgpt-${app.state.view}`;

function save(blob, file) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
