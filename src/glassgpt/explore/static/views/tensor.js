/* Tensors. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "tensor",
  title: { en: "Tensors", zh: "张量" },
  intro: { en: "Every number, and where it came from.", zh: "每个数，以及它从何而来。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
