/* Guided tour. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "tour",
  title: { en: "Tour", zh: "导览" },
  intro: { en: "Predict, then look.", zh: "先猜，再看。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
