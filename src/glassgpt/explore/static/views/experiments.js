/* Experiments. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "experiments",
  title: { en: "Experiments", zh: "实验" },
  intro: { en: "Switch parts off, patch from a second prompt, compare.", zh: "关闭部件、从另一段文本移植、比较。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
