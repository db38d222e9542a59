/* A second trace beside the present one: another prompt, another model, the text as it grows.

   const other = await second(app, {tokens}, signal); await other.get("loss")
   Fields that are not given are those of the state. The server gives the same id for the same
   request; a trace that it holds no longer (410) is asked for anew, silently. */

import { traceRequest } from "../state.js";

export async function second(app, changes, signal) {
  const request = { ...traceRequest(app.state), ...changes };
  if (changes.tokens) delete request.text;
  if (changes.text !== undefined) delete request.tokens;
  let answer = await app.api.trace(request, { shown: false, signal });

  async function ask(question) {
    try {
      return await question(`trace/${answer.trace}`);
    } catch (error) {
      if (error.status !== 410) throw error;
      answer = await app.api.trace(request, { shown: false, signal });
      return question(`trace/${answer.trace}`);
    }
  }

  return {
    get id() { return answer.trace; },
    tokens: answer.tokens,
    next: answer.next,
    get: (path) => ask((base) => app.api.get(`${base}/${path}`, signal)),
    post: (path, value) => ask((base) => app.api.post(`${base}/${path}`, value, signal)),
  };
}

/** Compares two traces; both are requested again if the server no longer holds one of them. */
export async function compared(app, a, b, signal) {
  const question = () => app.api.get(`compare?a=${a.id}&b=${b.id}`, signal);
  try {
    return await question();
  } catch (error) {
    if (error.status !== 410) throw error;
    await Promise.all([a.get("loss"), b.get("loss")]); // each requests its trace again
    return question();
  }
}
