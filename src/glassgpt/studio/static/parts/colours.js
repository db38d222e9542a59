/* Colours of numbers. Two scales, which people who do not see red or green can tell apart:
   "share" (0 to 1) from paper to deep teal; "diverging" blue, paper, orange around zero. */

import { css } from "./dom.js";

function rgb(hex) {
  const n = parseInt(hex.slice(1), 16);
  return [n >> 16, (n >> 8) & 255, n & 255];
}

const mix = (a, b, x) => a.map((from, i) => from + (b[i] - from) * x);

/** colour(value) -> [r, g, b], for numbers up to `most`, in the present theme. */
export function scaleOf(kind, most) {
  const [zero, more, less, full] = ["--zero", "--more", "--less", "--full"].map((name) =>
    rgb(css(name)));
  const end = most || 1;
  // The square root makes small shares visible beside a large one.
  if (kind === "share") return (value) => mix(zero, full, Math.sqrt(Math.min(1, value / end)));
  return (value) => {
    const x = Math.max(-1, Math.min(1, value / end));
    return mix(zero, x < 0 ? less : more, Math.sqrt(Math.abs(x)));
  };
}

export const voidColour = () => rgb(css("--void"));

/** colour(value) as a CSS colour. */
export const cssColour = (triple) => `rgb(${triple.map(Math.round).join(" ")})`;

/** The scale from end to end, as a CSS gradient. */
export function gradient(kind, most) {
  const colour = scaleOf(kind, most);
  const stops = [0, 0.25, 0.5, 0.75, 1].map((x) =>
    cssColour(colour(kind === "share" ? x * most : (2 * x - 1) * most)));
  return `linear-gradient(to right, ${stops.join(", ")})`;
}
