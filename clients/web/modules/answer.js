/**
 * One answer while it is drawn and after it.
 *
 * @typedef {object} Answer
 * @property {"drawing"|"writing"|"done"|"failed"|"cancelled"} state
 * @property {string} text
 * @property {number} finished The candidates that are finished, as far as the server has said.
 * @property {object[]} tokens Entries of OpenAI's logprobs, if they were asked for.
 * @property {object|null} report The `align` report.
 * @property {object|null} usage OpenAI's usage.
 * @property {string|null} finish The reason why the answer ended.
 * @property {import("./errors.js").ApiError|null} error
 * @property {object} body The body of the request.
 * @property {number} start Milliseconds of the page's clock.
 * @property {number|null} firstToken
 * @property {number|null} end
 */

/** @returns {Answer} An answer whose request is about to be sent. */
export function newAnswer(body) {
  return {
    state: "drawing",
    text: "",
    finished: 0,
    tokens: [],
    report: null,
    usage: null,
    finish: null,
    error: null,
    body,
    start: performance.now(),
    firstToken: null,
    end: null,
  };
}

/**
 * Return the answer with one chunk of the stream added.
 * @param {Answer} answer
 * @param {object} chunk
 * @returns {Answer}
 */
export function withChunk(answer, chunk) {
  const next = { ...answer };
  if (chunk.usage) next.usage = chunk.usage;
  if (chunk.align) next.report = chunk.align;
  const choice = chunk.choices?.[0];
  if (!choice) return next;
  const text = choice.delta?.content ?? choice.delta?.refusal ?? "";
  if (text) {
    next.text += text;
    next.state = "writing";
    next.firstToken ??= performance.now();
  }
  if (choice.logprobs?.content) next.tokens = [...next.tokens, ...choice.logprobs.content];
  if (choice.finish_reason) next.finish = choice.finish_reason;
  return next;
}

/** Return the answer with what a comment of the server says about its candidates. */
export function withComment(answer, comment) {
  const match = /(\d+) are finished/.exec(comment);
  return match ? { ...answer, finished: Number(match[1]) } : answer;
}

/** Return the answer at its end. */
export function ended(answer, state, error = null) {
  return { ...answer, state, error, end: performance.now() };
}

/** Return true while the request runs. */
export function isRunning(answer) {
  return answer.state === "drawing" || answer.state === "writing";
}
