/* Loss per token. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "loss",
  title: { en: "Loss", zh: "损失" },
  intro: { en: "Where the model is surprised.", zh: "模型在哪里感到意外。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
