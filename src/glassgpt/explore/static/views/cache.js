/* KV cache. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "cache",
  title: { en: "KV cache", zh: "KV 缓存" },
  intro: { en: "What is reused, what is computed, in bytes.", zh: "复用了什么、计算了什么、占多少字节。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
