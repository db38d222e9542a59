/* Lines that must be read: one per cause, until it is gone or dismissed. Knows no cause. */

import { el } from "./parts/dom.js";

/** `t` is asked when a line is shown, so that it speaks the language of then. */
export function makeAlerts(root, t) {
  const lines = new Map(); // cause -> element
  return {
    /** Says it; a second line for the same cause takes the first one's place. */
    say(message, cause = message, kind = "bad") {
      const line = el("p", { class: `alert ${kind}`, "data-cause": cause }, el("span", null, message),
        el("button", { type: "button", class: "quiet", "aria-label": t()("dismiss"),
          onclick: () => this.clear(cause) }, "×"));
      const old = lines.get(cause);
      if (old?.firstChild.textContent === message) return;
      if (old) old.replaceWith(line);
      else root.append(line);
      lines.set(cause, line);
    },
    clear(cause) {
      lines.get(cause)?.remove();
      lines.delete(cause);
    },
  };
}
