/* Tokens as people see them: white space visible, broken characters as bytes.

   const strip = tokenStrip(app, {label, onpick}); root.append(strip.root); strip.show(tokens, 3)
   The strip is one stop of the Tab key; arrows move in it. */

import { el } from "./dom.js";

const MARKS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u3000": "□" };

/** Nodes that show a token's text: marks for white space, hex for bytes that are no character. */
export function visible(token) {
  const text = token.text ?? "";
  if (token.special || (text === "" && !token.bytes?.length)) {
    return [el("span", { class: "special" }, text || "∅")];
  }
  if (text.includes("\ufffd") && token.bytes?.length) {
    return [el("span", { class: "special" }, token.bytes.map(hex).join(" "))];
  }
  return [...text].map((letter) => (Object.hasOwn(MARKS, letter)
    ? el("span", { class: "white" }, MARKS[letter]) : letter));
}

/** The text of a token as a plain string, for labels, canvases and options. */
export function plain(token) {
  return visible(token).map((node) => node.textContent ?? node).join("");
}

export const hex = (byte) => byte.toString(16).padStart(2, "0").toUpperCase();

/** A row of tokens of which one is selected. */
export function tokenStrip(app, { label, onpick }) {
  const root = el("div", { class: "tokens", role: "listbox", "aria-label": label,
    "aria-orientation": "horizontal", tabindex: "0" });
  let tokens = [];
  let selected = 0;

  function mark(at, look) {
    for (const item of root.querySelectorAll('[aria-selected="true"]')) {
      item.setAttribute("aria-selected", "false");
    }
    selected = at;
    const item = root.children[at];
    if (!item) return;
    item.setAttribute("aria-selected", "true");
    root.setAttribute("aria-activedescendant", item.id);
    if (look) item.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  root.addEventListener("click", (event) => {
    const item = event.target.closest("[data-at]");
    if (item) onpick(Number(item.dataset.at));
  });
  root.addEventListener("keydown", (event) => {
    const last = tokens.length - 1;
    const to = { ArrowRight: selected + 1, ArrowLeft: selected - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    mark(Math.min(Math.max(0, to), last), true);
    onpick(selected);
  });

  return {
    root,
    /** `shade`: the CSS colour behind each token, or null. `notes`: a line under each. */
    show(now, at, { shade, notes } = {}) {
      tokens = now;
      root.replaceChildren(...now.map((token, i) => el("span", {
        id: `${root.id || "strip"}-${i}`, role: "option", class: "token", "data-at": i,
        "data-id": token.id, "aria-selected": "false", style: shade?.[i]
          && `--shade:${shade[i]}`,
      }, el("b", null, visible(token)), notes && el("small", null, notes[i]))));
      mark(at, false);
    },
    select: (at) => mark(at, true),
  };
}
