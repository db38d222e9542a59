/* The tokens view: the text as the model gets it. Pieces, their ids and bytes, and their merges. */

import { el } from "../parts/dom.js";
import { count } from "../parts/numbers.js";
import { hex, plain, visible } from "../parts/tokens.js";

const MOST_CARDS = 400;

export default {
  key: "tokens",
  title: { en: "Tokens", zh: "词元" },
  intro: {
    en: "The model never sees letters. It sees numbers: one for each piece of text that its "
      + "tokenizer knows. Edit the text above and watch the pieces change; choose one to see how "
      + "it was built.",
    zh: "模型看不到字母，只看到数字：分词器认识的每一段文本对应一个数字。"
      + "编辑上方的文本，观察切分如何变化；选中一个词元，看它是怎样拼成的。",
  },
  words: {
    en: {
      summary: "{characters} characters → {bytes} bytes → {tokens} tokens",
      ratio: "{n} bytes per token",
      kind: "Tokenizer: {kind}, {n} tokens in the vocabulary",
      all: "All tokens",
      piece: "Token {id}",
      at: "At position {n}",
      id: "Id",
      bytes: "Bytes (UTF-8)",
      merges: "Built in {n} merges",
      mergesNote: "Byte pair encoding starts from single bytes. It always joins the pair "
        + "that was learned first, until no learned pair is left.",
      noMerges: "One unit of the vocabulary: nothing was merged.",
      special: "A special token: it stands for no text of its own.",
      left: "Left", right: "Right", whole: "Becomes", number: "Step",
      more: "{n} more tokens are not drawn here; the row above shows all of them.",
      position: "Position", text: "Text",
    },
    zh: {
      summary: "{characters} 个字符 → {bytes} 个字节 → {tokens} 个词元",
      ratio: "每个词元 {n} 字节",
      kind: "分词器：{kind}，词表共 {n} 个词元",
      all: "全部词元",
      piece: "词元 {id}",
      at: "位于位置 {n}",
      id: "编号",
      bytes: "字节（UTF-8）",
      merges: "经过 {n} 次合并",
      mergesNote: "字节对编码从单个字节开始，总是先合并最早学到的那一对，直到无法再合并。",
      noMerges: "词表中的一个单元：没有经过合并。",
      special: "特殊词元：它本身不代表任何文本。",
      left: "左", right: "右", whole: "得到", number: "步骤",
      more: "另有 {n} 个词元未在此画出；上方一行显示全部。",
      position: "位置", text: "文本",
    },
  },

  mount(root, app) {
    const { t } = app;
    const facts = el("p", { class: "facts" });
    const detail = el("section", { class: "panel detail", "aria-label": t("piece", { id: "" }) });
    const list = el("div", { class: "cards" });
    root.append(facts, detail, el("h2", null, t("all")), list);

    return {
      async update(state, signal) {
        const { tokens } = app.trace;
        showFacts(app, facts, tokens);
        showList(app, list, tokens);
        const token = tokens[app.position];
        const { merges } = await app.api.get(`token/${token.id}?model=${state.model}`, signal);
        showDetail(app, detail, token, merges);
      },
    };
  },
};

function showFacts(app, root, tokens) {
  const { t, model } = app;
  const bytes = tokens.reduce((sum, token) => sum + token.bytes.length, 0);
  const text = tokens.map((token) => (token.special ? "" : token.text)).join("");
  root.replaceChildren(
    el("b", null, t("summary", { characters: count([...text].length), bytes: count(bytes),
      tokens: count(tokens.length) })),
    el("span", null, t("ratio", { n: (bytes / tokens.length).toFixed(2) })),
    el("span", null, t("kind", { kind: model.tokenizer.kind, n: count(model.vocab_size) })));
}

function showList(app, root, tokens) {
  const { t } = app;
  const head = ["position", "text", "id", "bytes"].map((key) => el("th", { scope: "col" }, t(key)));
  const rows = tokens.slice(0, MOST_CARDS).map((token, i) => el("tr", {
    class: i === app.position ? "now" : null, "data-position": i, "data-id": token.id,
  },
  el("td", { class: "number" }, i),
  el("th", { scope: "row" }, el("button", { type: "button", class: "plain",
    onclick: () => app.set({ position: i }, { replace: true }) }, visible(token))),
  el("td", { class: "number" }, token.id),
  el("td", { class: "hex" }, token.bytes.map(hex).join(" "))));
  root.replaceChildren(
    el("table", { class: "list" }, el("thead", null, el("tr", null, head)),
      el("tbody", null, rows)),
    ...(tokens.length > MOST_CARDS ? [el("p", null, t("more", { n: tokens.length - MOST_CARDS }))]
      : []));
}

function showDetail(app, root, token, merges) {
  const { t } = app;
  const parts = [
    el("h2", null, el("span", { class: "piece" }, visible(token)), " ",
      t("piece", { id: token.id })),
    el("dl", null,
      el("dt", null, t("at", { n: "" }).trim()), el("dd", null, app.position),
      el("dt", null, t("id")), el("dd", null, token.id),
      el("dt", null, t("bytes")),
      el("dd", { class: "hex" }, token.bytes.map(hex).join(" ") || "–")),
  ];
  if (token.special) parts.push(el("p", null, t("special")));
  else if (!merges.length) parts.push(el("p", null, t("noMerges")));
  else parts.push(...mergeTable(app, merges));
  root.setAttribute("aria-label", `${t("piece", { id: token.id })} ${plain(token)}`);
  root.replaceChildren(...parts);
}

function mergeTable(app, merges) {
  const { t } = app;
  const piece = (text) => el("td", null, el("span", { class: "piece" }, visible({ text })));
  return [
    el("h3", null, t("merges", { n: merges.length })),
    el("p", null, t("mergesNote")),
    el("table", { class: "list merges" },
      el("thead", null, el("tr", null, ["number", "left", "right", "whole"].map((key) =>
        el("th", { scope: "col" }, t(key))))),
      el("tbody", null, merges.map(([left, right, whole], i) => el("tr", null,
        el("td", { class: "number" }, i + 1), piece(left), piece(right), piece(whole))))),
  ];
}
