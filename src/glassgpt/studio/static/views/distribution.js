/* Part of the next-token view: what each filter leaves; the likeliest tokens, with the cuts.

   const panel = distributionPanel(app, onforce); panel.show(answer)
   `answer` is that of POST /api/trace/ID/distribution: every number here is one of it. */

import { el } from "../parts/dom.js";
import { brief, count, percent } from "../parts/numbers.js";
import { roam } from "../parts/roam.js";
import { plain, visible } from "../parts/tokens.js";

export function distributionPanel(app, onforce) {
  const { t } = app;
  const stages = el("table", { class: "stages list" });
  const table = el("table", { class: "dist" });
  const keys = roam(table);
  return {
    stages: el("section", { class: "panel", "aria-label": t("stages") },
      el("h2", null, t("stages")), el("p", { class: "aside" }, t("stagesNote")), stages),
    list: el("section", { class: "panel", "aria-label": t("likeliest") },
      el("h2", null, t("likeliest")), el("p", { class: "aside" }, t("forceNote")),
      el("div", { class: "scroll tall" }, table)),
    show(answer) {
      stages.replaceChildren(...stageRows(app, answer.stages));
      keys.redraw(() => table.replaceChildren(...tokenRows(app, answer, onforce)));
    },
  };
}

function stageRows(app, stages) {
  const { t } = app;
  return [
    el("thead", null, el("tr", null, ["stage", "kept", "mass", "entropy"].map((key) =>
      el("th", { scope: "col", class: key === "stage" ? null : "number" }, t(key))))),
    el("tbody", null, stages.map((stage, i) => {
      const cuts = i > 0 && stage.kept < stages[i - 1].kept;
      return el("tr", { "data-name": "stage", "data-index": stage.name, "data-value": stage.mass,
        "data-kept": stage.kept, "data-entropy": stage.entropy, "data-cut": stage.cut,
        "data-on": stage.on, class: cuts ? "cuts" : stage.on ? null : "idle" },
      el("th", { scope: "row" }, t(`stage.${stage.name}`), cuts
        ? el("small", null, t("cutAt", { p: percent(stage.cut) }))
        : !stage.on && el("small", null, t("off"))),
      el("td", { class: "number" }, count(stage.kept)),
      el("td", { class: "number mass", style: `--share:${stage.mass}` }, percent(stage.mass)),
      el("td", { class: "number" }, brief(stage.entropy, 3)));
    })),
  ];
}

function tokenRows(app, { tokens, stages }, onforce) {
  const { t } = app;
  const most = Math.max(...tokens.map((token) => Math.max(token.p, token.final)), 1e-30);
  const lines = cutLines(tokens, stages);
  const rows = tokens.flatMap((token, i) => [
    ...(lines.get(i) ?? []).map((stage) => cutLine(app, stage)),
    el("tr", { class: token.final === 0 ? "out" : null, "data-name": "distribution",
      "data-index": token.id, "data-value": token.p, "data-final": token.final,
      "data-logit": token.logit, "data-cut": token.cut_by },
    el("th", { scope: "row" }, el("button", { type: "button", class: "plain",
      "aria-label": t("force", { token: plain(token) }), onclick: () => onforce(token) },
    visible(token))),
    el("td", { class: "number" }, percent(token.p)),
    el("td", { class: "double", "aria-hidden": "true" },
      el("i", { class: "own", style: `--share:${token.p / most}` }),
      el("i", { class: "final", style: `--share:${token.final / most}` })),
    el("td", { class: "number" }, token.final === 0 ? el("small", null, token.cut_by
      ? t(`stage.${token.cut_by}`) : "–") : percent(token.final))),
  ]);
  return [
    el("caption", { class: "unseen" }, t("likeliest")),
    el("thead", null, el("tr", null, el("th", { scope: "col" }, t("token")),
      el("th", { scope: "col", class: "number" }, t("own")),
      el("th", { scope: "col" }, el("span", { class: "unseen" }, t("bar"))),
      el("th", { scope: "col", class: "number" }, t("final")))),
    el("tbody", null, rows),
  ];
}

const cutLine = (app, stage) => el("tr", { class: "cutline", "data-stage": stage.name },
  el("td", { colspan: 4 }, app.t("cutLine", { stage: app.t(`stage.${stage.name}`),
    kept: count(stage.kept), mass: percent(stage.mass) })));

/** Row -> stages that cut there. A penalty can move tokens past each other; then there is no one
    line to draw, and only the tokens themselves say which stage took them. */
function cutLines(tokens, stages) {
  const lines = new Map();
  for (const stage of stages) {
    const first = tokens.findIndex((token) => token.cut_by === stage.name);
    if (first < 0 || tokens.slice(first).some((token) => token.final > 0)) continue;
    lines.set(first, [...(lines.get(first) ?? []), stage]);
  }
  return lines;
}
