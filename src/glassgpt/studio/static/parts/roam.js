/* Tables and rows of buttons by keyboard: one stop of the Tab key, arrows move inside.

   const grid = roam(table); grid.redraw(() => table.replaceChildren(...), chosenButton)
   Lines are table rows, or whatever `lines` finds; knows nothing of what the buttons do. */

export function roam(root, lines = "tr") {
  const buttons = (line) => [...line.querySelectorAll("button:not(:disabled)")];
  const all = () => [...root.querySelectorAll(lines)].map(buttons).filter((row) => row.length);

  function place(button) {
    const rows = all();
    const row = rows.findIndex((line) => line.includes(button));
    return row < 0 ? null : [row, rows[row].indexOf(button)];
  }

  function at([row, column]) {
    const rows = all();
    const line = rows[Math.min(Math.max(0, row), rows.length - 1)];
    return line?.[Math.min(Math.max(0, column), line.length - 1)];
  }

  function stop(button) {
    for (const line of all()) for (const one of line) one.tabIndex = -1;
    if (button) button.tabIndex = 0;
  }

  root.addEventListener("keydown", (event) => {
    const from = place(event.target);
    const [row, column] = from ?? [0, 0];
    const to = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], Home: [row, 0],
      End: [row, Infinity] }[event.key];
    if (!from || !to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    at(to)?.focus();
  });
  root.addEventListener("focusin", (event) => {
    if (event.target.closest("button")) stop(event.target.closest("button"));
  });

  return {
    /** Draws again. The focus stays where it was, and Tab leads to `chosen()` or the first one. */
    redraw(draw, chosen) {
      const focused = root.contains(document.activeElement) ? place(document.activeElement) : null;
      draw();
      const now = focused ? at(focused) : null;
      stop(now ?? chosen?.() ?? at([0, 0]));
      now?.focus({ preventScroll: true });
    },
  };
}
