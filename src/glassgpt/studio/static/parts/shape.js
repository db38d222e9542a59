/* A tensor's shape: (T, C) = 7, 64. Point at a letter, or focus it, to read its meaning. */

import { el } from "./dom.js";
import { explain } from "./tip.js";

const SIZES = { C: "n_embd", H: "n_head", K: "n_kv_head", D: "head_dim", F: "n_hidden",
  V: "vocab_size", L: "n_layer" };

/** The number of a letter, for this model and `T` tokens; null if it is not one letter. */
export function sizeOf(symbol, config, T) {
  if (symbol === "T" || symbol === "S") return T;
  if (symbol === "T-1") return Math.max(0, T - 1);
  if (symbol === "B" || symbol === "1") return 1;
  if (symbol === "D/2") return config.head_dim / 2;
  if (symbol === "HD") return config.n_head * config.head_dim;
  if (symbol === "3C") return 3 * config.n_embd;
  if (symbol === "3H") return 3 * config.n_head;
  if (symbol === "H+2K") return config.n_head + 2 * config.n_kv_head;
  if (symbol === "3HD") return 3 * config.n_head * config.head_dim;
  if (symbol === "(H+2K)D") return (config.n_head + 2 * config.n_kv_head) * config.head_dim;
  if (symbol === "context") return config.context_length;
  return config[SIZES[symbol]] ?? null;
}

/** What the letters of a symbol mean: those of "H+2K" are H and K. */
export function meaning(app, symbol) {
  const letters = symbol === "context" ? [] : symbol.match(/[A-Z]/g) ?? [];
  const T = app.trace?.tokens.length ?? app.model.context_length;
  const words = [...new Set(letters)].map((letter) => `${letter}: ${app.t(`legend.${letter}`)}`
    + ` = ${sizeOf(letter, app.model.config, T) ?? "?"}`);
  return words.join("\n") || app.t("legend.other", { symbol });
}

/** `symbols`, each with a tooltip, then the numbers. */
export function shape(app, symbols, numbers) {
  const letters = symbols.map((symbol) => explain(
    el("button", { type: "button", class: "symbol" }, symbol), () => meaning(app, symbol)));
  return el("span", { class: "shape" }, "(", letters.flatMap((node, i) => (i ? [", ", node]
    : [node])), ")", numbers && el("span", { class: "sizes" }, ` = ${numbers.join(" × ")}`));
}
