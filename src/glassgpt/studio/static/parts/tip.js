/* One tooltip for the whole page, for the pointer and for the keyboard; Escape closes it.

   explain(element, () => "what it is")  (text, or a node)  */

const HIDE_AFTER = 120; // ms: time to move the pointer into the tooltip

let owner = null;
let hiding = 0;

/** Shows what `say()` returns while the pointer is on `element` or it has the focus. */
export function explain(element, say) {
  const show = () => open(element, say());
  element.addEventListener("pointerenter", show);
  element.addEventListener("focus", show);
  element.addEventListener("pointerleave", soon);
  element.addEventListener("blur", close);
  return element;
}

function open(element, content) {
  clearTimeout(hiding);
  const tip = document.getElementById("tip");
  if (!content) return;
  owner?.removeAttribute("aria-describedby");
  owner = element;
  element.setAttribute("aria-describedby", "tip");
  tip.replaceChildren(content);
  tip.hidden = false;
  const at = element.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), innerWidth - width - 8);
  const below = at.bottom + 8 + height < innerHeight || at.top < height + 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 8 : at.top - height - 8}px`;
}

function soon() {
  clearTimeout(hiding);
  hiding = setTimeout(close, HIDE_AFTER);
}

export function close() {
  document.getElementById("tip").hidden = true;
  owner?.removeAttribute("aria-describedby");
  owner = null;
}

export function watchTips() {
  const tip = document.getElementById("tip");
  tip.addEventListener("pointerenter", () => clearTimeout(hiding));
  tip.addEventListener("pointerleave", soon);
  addEventListener("keydown", (event) => event.key === "Escape" && close());
  addEventListener("scroll", close, { passive: true });
}
