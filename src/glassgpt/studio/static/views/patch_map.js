/* Part of the experiments view: where the difference between two texts lies (blocks x positions).

   const map = patchMap(app); await map.update(other, signal)   other: the second text's trace, null
   A table whose cells are coloured; one forward pass a block, so long texts wait for a button. */

import { choice, el, field } from "../parts/dom.js";
import { brief } from "../parts/numbers.js";
import { plain, visible } from "../parts/tokens.js";

const AT_ONCE = 32; // tokens: for shorter texts, the map is computed without a click
const ROUNDING = 1e-4; // logits: smaller differences are only rounding, and get no colour
const NAMES = ["resid_post", "attn_out", "mlp_out"];

export function patchMap(app) {
  const { t } = app;
  const tools = el("div", { class: "controls" });
  const table = el("table", { class: "parts-map" });
  const frame = el("div", { class: "scroll", tabindex: "0", role: "group",
    "aria-label": t("map") }, table);
  const root = el("section", { class: "panel", "aria-label": t("map"), hidden: true },
    el("h2", null, t("map")), el("p", { class: "aside" }, t("mapNote")), tools, frame);
  let name = NAMES[0];
  let token = null; // the token whose logit is shown; null: the likeliest of the second text
  let wanted = ""; // the long texts whose map was asked for
  let redraw = () => {};

  const say = (work) => work.catch((error) => {
    if (error.name !== "AbortError") app.alerts.say(error.message, "map");
  });

  async function draw(other, signal) {
    const here = app.trace.tokens;
    const tokens = here.map(({ id }) => id);
    const there = other.tokens.map(({ id }) => id);
    const candidates = likely(other.next.top, app.trace.next.top);
    const asked = candidates.find((one) => one.id === token) ?? candidates[0];
    const key = JSON.stringify([tokens, there]);
    const ready = tokens.length <= AT_ONCE || wanted === key;
    showTools({ candidates, asked, ready, key });
    frame.hidden = !ready;
    if (!ready) return;
    const { model, snapshot } = app.state;
    const { shape, data } = await app.api.postTensor("patch_map", { tokens, other: there,
      token: asked.id, name, model, snapshot }, signal);
    table.replaceChildren(...cells(app, here, other.tokens, shape, data));
  }

  function showTools({ candidates, asked, ready, key }) {
    const again = () => say(redraw());
    tools.replaceChildren(
      field(t("mapToken"), choice(candidates.map((one) => [String(one.id), plain(one)]),
        String(asked.id), (id) => { token = Number(id); again(); })),
      field(t("mapName"), choice(NAMES.map((one) => [one, t(`mapName.${one}`)]), name,
        (picked) => { name = picked; again(); })),
      ...(ready ? [] : [el("button", { type: "button", onclick: () => { wanted = key; again(); } },
        t("mapCompute"))]));
  }

  return {
    root,
    async update(other, signal) {
      root.hidden = !other;
      if (!other) return;
      redraw = () => draw(other, signal);
      await redraw();
    },
  };
}

/** The likeliest tokens of both texts, those of the second first, without duplicates. */
function likely(first, then) {
  const all = [...first.slice(0, 5), ...then.slice(0, 5)];
  return all.filter((token, i) => all.findIndex(({ id }) => id === token.id) === i);
}

function cells(app, here, there, [layers, T], data) {
  const { t } = app;
  const largest = data.reduce((most, value) => Math.max(most, Math.abs(value)), ROUNDING);
  const same = (i) => here[i].id === there[i].id;
  const head = here.map((token, i) => el("th", { scope: "col", class: same(i) ? null : "now" },
    visible(token), !same(i) && [el("br"), visible(there[i])]));
  const cell = (layer, i) => {
    const value = data[layer * T + i];
    return el("td", { "data-name": "patch_map", "data-index": `${layer},${i}`,
      "data-value": value, class: value < 0 ? "less" : "more",
      style: `--share:${(Math.abs(value) / largest).toFixed(3)}` }, brief(value, 2));
  };
  return [el("caption", { class: "unseen" }, t("map")),
    el("thead", null, el("tr", null, el("td"), head)),
    el("tbody", null, Array.from({ length: layers }, (_, layer) => el("tr", null,
      el("th", { scope: "row" }, t("mapRow", { n: layer })), here.map((_, i) => cell(layer, i)))))];
}
