/* Lines that people must read: one per cause, until the cause is gone or the line is dismissed. */

import { el } from "./parts/dom.js";

/** `t` is called when a line is shown, so that the line has the language of that moment. */
export function makeAlerts(root, t) {
  const lines = new Map(); // cause -> element
  return {
    /** Shows a line, which replaces an earlier one of the same cause. */
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
