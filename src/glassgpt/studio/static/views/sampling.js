/* The settings of sampling: a slider and a number each, in the order in which they are applied.

   const knobs = settings(app); root.append(knobs.root); knobs.update()
   They change state.sampling, in which what is off does not stand, and state.seed. */

import { el } from "../parts/dom.js";

/** name, least, largest, step, the value at which it does nothing. `log`: the slider's scale. */
const KNOBS = [
  { name: "repetition_penalty", least: 1, most: 2, step: 0.05, off: 1 },
  { name: "temperature", least: 0, most: 2, step: 0.05, off: 1 },
  { name: "top_k", least: 1, most: null, step: 1, off: null, log: true },
  { name: "top_p", least: 0.01, most: 1, step: 0.01, off: 1 },
  { name: "min_p", least: 0, most: 1, step: 0.01, off: 0 },
];
const FINE = 1000; // places of a logarithmic slider

export function settings(app) {
  const { t } = app;
  const knobs = KNOBS.map((knob) => makeKnob(app, knob));
  const seed = number(app, "seed", (value) => app.set({ seed: value ?? 1337 }));
  const sample = number(app, "sample", (value) => app.set({ sample: value ?? 0 }));
  const reset = el("button", { type: "button", class: "quiet",
    onclick: () => app.set({ sampling: {} }) }, t("allOff"));
  return {
    root: el("section", { class: "panel knobs", "aria-label": t("settings") },
      el("h2", null, t("settings"), " ", reset), knobs.map((knob) => knob.root),
      el("div", { class: "controls" }, seed.root, sample.root)),
    update() {
      for (const knob of knobs) knob.update();
      seed.input.value = app.state.seed;
      sample.input.value = app.state.sample;
      reset.hidden = !Object.keys(app.state.sampling).length;
    },
  };
}

function number(app, name, take) {
  const input = el("input", { type: "number", min: 0, step: 1, id: `knob-${name}`,
    onchange: () => take(input.value === "" ? null
      : Math.max(0, Math.round(Number(input.value)))) });
  return { input, root: el("div", { class: "field" },
    el("label", { for: input.id }, app.t(name)), input) };
}

function makeKnob(app, { name, least, most, step, off, log }) {
  const largest = most ?? app.model.vocab_size;
  const none = off ?? largest; // where the slider does nothing
  const toSlider = (value) => (log ? FINE * Math.log(value / least) / Math.log(largest / least)
    : value);
  const fromSlider = (place) => (log ? Math.round(least * (largest / least) ** (place / FINE))
    : place);
  const set = (value, options) => {
    const sampling = { ...app.state.sampling };
    if (value === null || value === none) delete sampling[name];
    else sampling[name] = value;
    app.set({ sampling }, options);
  };
  const slider = el("input", { type: "range", id: `knob-${name}`, min: log ? 0 : least,
    max: log ? FINE : largest, step: log ? 1 : step,
    oninput: () => set(fromSlider(Number(slider.value)), { replace: true }) });
  const exact = el("input", { type: "number", step: "any", min: 0, "data-knob": name,
    "aria-label": app.t(`${name}.exact`), placeholder: app.t("off"),
    onchange: () => set(exact.value === "" ? null : Number(exact.value)) });
  return {
    root: el("div", { class: "knob" }, el("label", { for: slider.id }, app.t(name)), slider, exact),
    update() {
      const value = app.state.sampling[name] ?? null;
      slider.value = toSlider(value ?? none);
      slider.setAttribute("aria-valuetext", value === null && name !== "temperature"
        ? app.t("off") : String(value ?? none));
      if (document.activeElement !== exact) {
        exact.value = value ?? (name === "temperature" ? "1" : "");
      }
    },
  };
}
