/* The server, as functions: JSON as objects, tensors as Float32Array with their shape.

   await api.trace(request); await api.tensor("blocks.0.pattern", {head: 2}, signal)
   Answers about a trace are kept until it changes. A trace that the server holds no longer (410) is
   asked for anew, silently. Knows no view; every failure is an `ApiError` with a line to show. */

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

const MOST_KEPT = 300; // answers in memory

export function makeApi(sayGone) {
  const kept = new Map(); // path -> promise of an answer
  let request = null; // the request of the present trace
  let current = null; // the id of the present trace

  async function ask(path, options) {
    let response;
    try {
      response = await fetch(`api/${path}`, options);
    } catch {
      throw new ApiError(sayGone(), 0);
    }
    if (response.ok) return response;
    let message = `${response.status} ${response.statusText}`;
    try {
      const body = await response.json();
      message = body.error ?? (body.detail && JSON.stringify(body.detail)) ?? message;
    } catch { /* not an answer of ours: only the status is shown */ }
    throw new ApiError(message, response.status);
  }

  const body = (value) => ({
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(value),
  });

  async function readTensor(response) {
    const shape = response.headers.get("X-Shape").split(",").map(Number);
    const bytes = await response.arrayBuffer();
    const whole = response.headers.get("Content-Type") === "application/octet-stream";
    const floats = whole && bytes.byteLength === 4 * shape.reduce((a, b) => a * b, 1);
    return { shape, data: floats ? new Float32Array(bytes) : new Uint8Array(bytes) };
  }

  /** A question about the present trace: `path` follows /api/trace/ID/. */
  async function ofTrace(path, read, options) {
    const key = `${current}/${path}${options ? options.body : ""}`;
    if (!kept.has(key)) {
      const answer = ask(`trace/${current}/${path}`, options)
        .catch(async (error) => {
          if (error.status !== 410) throw error;
          current = (await (await ask("trace", body(request))).json()).trace;
          return ask(`trace/${current}/${path}`, options);
        })
        .then(read);
      answer.catch(() => kept.delete(key));
      kept.set(key, answer);
      if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
    }
    return kept.get(key);
  }

  // A newer update of the view aborts the signal of the older one, whose answer is then dropped.
  const unlessOld = async (promise, signal) => {
    const answer = await promise;
    signal?.throwIfAborted();
    return answer;
  };
  const json = (response) => response.json();

  return {
    /** GET /api/PATH and POST /api/PATH, as JSON. Answers are not kept. */
    get: (path, signal) => unlessOld(ask(path).then(json), signal),
    post: (path, value, signal) => unlessOld(ask(path, body(value)).then(json), signal),
    /** POST whose answer is a tensor (patch_map). */
    postTensor: (path, value, signal) =>
      unlessOld(ask(path, body(value)).then(readTensor), signal),
    /** POST /api/trace. With `shown` it becomes the present trace; others are compared with it. */
    async trace(wanted, { shown = true, signal } = {}) {
      const answer = await ask("trace", body(wanted)).then(json);
      signal?.throwIfAborted();
      if (shown) [request, current] = [wanted, answer.trace];
      return answer;
    },
    /** GET or, with `value`, POST /api/trace/ID/PATH of the present trace, as JSON. */
    ofTrace: (path, signal, value) =>
      unlessOld(ofTrace(path, json, value && body(value)), signal),
    maps: (signal) => unlessOld(ofTrace("maps", readTensor), signal),
    /** An activation; `rows` and `columns` are [from, to) of its last two dimensions. */
    tensor(name, { head, rows, columns } = {}, signal) {
      const query = new URLSearchParams();
      if (head !== undefined && head !== null) query.set("head", head);
      if (rows) query.set("rows", rows.join(":"));
      if (columns) query.set("columns", columns.join(":"));
      const path = `tensor/${name}${query.size ? `?${query}` : ""}`;
      return unlessOld(ofTrace(path, readTensor), signal);
    },
    cell: (name, index, signal) =>
      unlessOld(ofTrace(`cell/${name}?index=${index.join(",")}`, json), signal),
  };
}
