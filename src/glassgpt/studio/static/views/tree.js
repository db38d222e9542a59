/* What was drawn, as a tree: every token is a button, every other try a branch.

   const child = grow(node, {id, text, p, final, how}); show(app, root, {tree, now, onpick})
   Knows nothing of how tokens are drawn. */

import { el } from "../parts/dom.js";
import { percent } from "../parts/numbers.js";
import { plain, visible } from "../parts/tokens.js";

export const seed = () => ({ id: null, parent: null, children: [] });

/** The child with this token, which is added if it is not there. */
export function grow(node, token) {
  const known = node.children.find((child) => child.id === token.id);
  if (known) return known;
  const child = { ...token, parent: node, children: [] };
  node.children.push(child);
  return child;
}

export function pathOf(node) {
  const path = [];
  for (let at = node; at.parent; at = at.parent) path.push(at);
  return path.reverse();
}

/** The node to which these ids lead, or null. */
export function follow(tree, ids) {
  let node = tree;
  for (const id of ids) {
    node = node.children.find((child) => child.id === id);
    if (!node) return null;
  }
  return node;
}

/** Removes a leaf and returns its parent. A node with branches stays. */
export function prune(node) {
  const { parent } = node;
  if (!node.children.length) parent.children.splice(parent.children.indexOf(node), 1);
  return parent;
}

export function show(app, root, { tree, now, onpick }) {
  const path = new Set(pathOf(now));
  const start = el("button", { type: "button", class: "start", onclick: () => onpick(tree),
    "aria-current": now === tree ? "true" : null }, app.t("tree.start"));
  root.replaceChildren(chain(app, tree, { path, now, onpick }, [start]));
}

/** A row of tokens as far as there is only one way, then a list of branches. */
function chain(app, node, how, chips = []) {
  let at = node;
  while (at.children.length === 1) {
    [at] = at.children;
    chips.push(chip(app, at, how));
  }
  const line = el("div", { class: "chain" }, chips);
  if (!at.children.length) return line;
  return [line, el("ul", { class: "branches" }, at.children.map((child) => el("li", {
    class: how.path.has(child) ? "on" : null,
  }, chain(app, child, how, [chip(app, child, how)]))))].reduce(
    (box, part) => (box.append(part), box), el("div"));
}

function chip(app, node, { path, now, onpick }) {
  const { t } = app;
  const chance = node.final === null || node.final === undefined ? "" : percent(node.final);
  const said = [plain(node), chance, t(`tree.${node.how}`, { n: node.sample })];
  return el("button", { type: "button", onclick: () => onpick(node),
    class: ["drawn", node.how, path.has(node) ? "on" : ""].join(" ").trim(),
    "aria-current": node === now ? "true" : null,
    "aria-label": said.filter(Boolean).join(", "), title: said.slice(1).filter(Boolean).join(", "),
    "data-name": "drawn", "data-index": pathOf(node).map((one) => one.id).join(","),
    "data-value": node.id, "data-p": node.p, "data-final": node.final, "data-how": node.how },
  el("b", null, node.end ? t("tree.end") : visible(node)), el("small", null, chance || "–"));
}
