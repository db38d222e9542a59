/* Next token. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "next",
  title: { en: "Next token", zh: "下一个词元" },
  intro: { en: "The distribution of the next token, and how one is drawn.", zh: "下一个词元的分布，以及如何从中抽取。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
