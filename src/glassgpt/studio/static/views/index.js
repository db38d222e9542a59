/* The views in the order of the page. */

import attention from "./attention.js";
import cache from "./cache.js";
import experiments from "./experiments.js";
import lens from "./lens.js";
import loss from "./loss.js";
import map from "./map.js";
import next from "./next.js";
import tensor from "./tensor.js";
import tokens from "./tokens.js";
import tour from "./tour.js";
import training from "./training.js";

export const VIEWS = [
  tour, tokens, map, tensor, attention, lens, next, experiments, loss, cache, training,
];
