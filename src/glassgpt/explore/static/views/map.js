/* Map. To be written: see views/tokens.js for the contract. */

import { el } from "../parts/dom.js";

export default {
  key: "map",
  title: { en: "Map", zh: "模型地图" },
  intro: { en: "The whole model, drawn from its config.", zh: "按配置画出的整个模型。" },
  words: { en: {}, zh: {} },
  mount(root) {
    root.append(el("p", null, "…"));
    return { update() {} };
  },
};
