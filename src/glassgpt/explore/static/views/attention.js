/* Attention. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "attention",
  title: { en: "Attention", zh: "注意力" },
  intro: { en: "Who looks at whom.", zh: "谁在看谁。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
