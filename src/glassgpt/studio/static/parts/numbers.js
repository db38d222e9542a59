/* Numbers as people read them, rounded; the exact ones are in the data attributes of tables. */

/** Four digits: 0.01234, -1.203, 12,345. Masked scores are -inf. */
export function brief(value, figures = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return signed(value.toExponential(Math.max(0, figures - 2)));
  const places = Math.max(0, figures - 1 - Math.floor(Math.log10(size)));
  return signed(value.toFixed(Math.min(places, 6)));
}

const signed = (text) => text.replace("-", "−");

/** 12.3 %, 0.04 %, <0.01 %. */
export function percent(p) {
  if (p === 0) return "0 %";
  if (p < 1e-4) return "<0.01 %";
  return `${(100 * p).toFixed(p >= 0.1 ? 1 : 2)} %`;
}

/** 124,439,808 */
export const count = (n) => n.toLocaleString("en-US");

/** 124.4M */
export function about(n) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (n >= size) return `${(n / size).toFixed(n >= 100 * size ? 0 : 1)}${letter}`;
  }
  return String(n);
}

/** 1.5 MB (10^6). */
export function bytes(n) {
  for (const [size, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (n >= size) return `${(n / size).toFixed(1)} ${name}`;
  }
  return `${n} B`;
}
