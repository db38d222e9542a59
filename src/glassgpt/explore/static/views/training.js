/* Training. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "training",
  title: { en: "Training", zh: "训练" },
  intro: { en: "The same prompt while the model learns.", zh: "模型学习过程中的同一段文本。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
