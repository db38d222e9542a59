/* Elements in one line: el("button", {class: "quiet", onclick: f}, "Reset"). Knows no page. */

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined
    && child !== false));
  return node;
}

export const el = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** A button that looks pressed or not. */
export function toggle(text, pressed, onclick, attributes) {
  return el("button", { type: "button", "aria-pressed": String(pressed), onclick, ...attributes },
    text);
}

/** A field with its label: field("Layer", select). */
let fields = 0;
export function field(text, control, attributes) {
  control.id ||= `field-${++fields}`;
  return el("div", { class: "field", ...attributes }, el("label", { for: control.id }, text),
    control);
}

/** A <select> from [value, text] pairs. */
export function choice(pairs, value, onpick) {
  const select = el("select", { onchange: () => onpick(select.value) },
    pairs.map(([key, text]) => el("option", { value: key }, text)));
  select.value = value;
  return select;
}

/** A group of buttons from [value, text] pairs, of which one is pressed. */
export function segments(label, pairs, value, onpick) {
  return el("div", { class: "segments", role: "group", "aria-label": label },
    pairs.map(([key, text]) => toggle(text, key === value, () => onpick(key))));
}

/** The value of a CSS variable, for what is drawn on a canvas. */
export const css = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();
