/* Logit lens. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "lens",
  title: { en: "Logit lens", zh: "逐层透视" },
  intro: { en: "What each layer would say if it were the last.", zh: "如果每一层就是最后一层，它会预测什么。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
