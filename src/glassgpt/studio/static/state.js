/* What the page shows, as one object that the URL's hash mirrors: share it, go back, reload.

   const store = makeStore(FIELDS); store.set({layer: 3}); store.state.layer
   Knows no server and no view. A field's default says how it is written: text as it is, numbers and
   booleans as such, everything else (null too) as JSON. What equals its default stays out. */

export const FIELDS = {
  view: "tokens",
  text: "The cat sat on the mat. The cat",
  tokens: null, // ids instead of `text`
  model: "a",
  snapshot: null, // step of a training run
  off: [], // parts switched off: "3", "3.attn", "3.mlp", "3.h2"
  fill: "zero", // what takes the place of parts that are off: "zero" or "mean"
  patch: null, // {text | tokens, parts}: activations of a second prompt
  layer: 0,
  head: 0,
  position: null, // of the chosen token; null is the last one
  tensor: "", // name of an activation
  cell: null, // index into it
  sampling: {}, // temperature, top_k, top_p, min_p, repetition_penalty
  seed: 1337,
  table: false, // pictures as tables
  lang: "", // "" follows the browser
  theme: "", // "" follows the system
};

// The server computes a new trace when one of these changes.
const COMPUTED = ["text", "tokens", "model", "snapshot", "off", "fill", "patch"];

/** The part of the state that decides what the model computes, as the server wants it. */
export function traceRequest(state) {
  const input = state.tokens ? { tokens: state.tokens } : { text: state.text };
  const { model, snapshot, off, fill, patch } = state;
  return { ...input, model, snapshot, off, fill, patch };
}

export function changesTrace(changed) {
  return changed.some((field) => COMPUTED.includes(field));
}

/** "#view=attention&layer=3" -> {view: "attention", layer: 3}, without what can't be read. */
export function readHash(hash, fields) {
  const found = {};
  for (const [name, written] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!Object.hasOwn(fields, name)) continue;
    const value = parse(written, fields[name]);
    if (value !== undefined) found[name] = value;
  }
  return found;
}

/** {view: "attention", layer: 3} -> "#view=attention&layer=3". */
export function writeHash(state, fields) {
  const words = new URLSearchParams();
  for (const [name, standard] of Object.entries(fields)) {
    if (!same(state[name], standard)) words.set(name, write(state[name], standard));
  }
  return words.toString() ? `#${words}` : "#";
}

function parse(written, standard) {
  if (typeof standard === "string") return written;
  try {
    const value = JSON.parse(written);
    const alike = value !== null && typeof value === typeof standard
      && Array.isArray(value) === Array.isArray(standard);
    return alike || standard === null ? value : undefined;
  } catch {
    return undefined;
  }
}

function write(value, standard) {
  return typeof standard === "string" ? String(value) : JSON.stringify(value);
}

export function same(a, b) {
  return a === b || JSON.stringify(a) === JSON.stringify(b);
}

/** `listener(state, changed)` is called after every change with the names of the fields. */
export function makeStore(fields, listener) {
  const store = { fields, state: { ...fields, ...readHash(location.hash, fields) } };
  const take = (next) => {
    const changed = Object.keys(fields).filter((name) => !same(store.state[name], next[name]));
    store.state = next;
    if (changed.length) listener(next, changed);
  };
  /** Changes fields. With `replace`, the history gets no new entry, as when typing or sliding. */
  store.set = (patch, { replace = false } = {}) => {
    const next = { ...store.state, ...patch };
    const hash = writeHash(next, fields);
    if (hash !== writeHash(store.state, fields)) {
      history[replace ? "replaceState" : "pushState"](null, "", hash);
    }
    take(next);
  };
  const fromUrl = () => take({ ...fields, ...readHash(location.hash, fields) });
  addEventListener("popstate", fromUrl);
  addEventListener("hashchange", fromUrl);
  return store;
}
