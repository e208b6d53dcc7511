/** The text of an answer, coloured by how much steering has changed the probability of each token. */

import { el, short } from "./dom.js";

// Changes of a logprob, in nats, from which a stronger colour is used.
const LEVELS = [0.1, 0.5, 1.5, 3];

/**
 * Return the change of a token's logprob by steering; 0 if the engine reports none.
 * @param {object} token An entry of OpenAI's logprobs.
 */
export function change(token) {
  if (typeof token.aligned_logprob !== "number") return 0;
  return token.aligned_logprob - token.logprob;
}

/** Return true if the tokens say what steering has changed, and are the text of the answer. */
export function isColoured(answer) {
  if (!answer.tokens.some((token) => typeof token.aligned_logprob === "number")) return false;
  return answer.tokens.map((token) => token.token).join("") === answer.text;
}

/**
 * Return the text as spans, one for each token.
 * @param {object[]} tokens
 * @returns {HTMLElement[]}
 */
export function tokenSpans(tokens) {
  return tokens.map((token) => {
    const difference = change(token);
    const level = LEVELS.filter((limit) => Math.abs(difference) >= limit).length;
    if (level === 0) return el("span", {}, token.token);
    const direction = difference > 0 ? "up" : "down";
    return el("span", { class: `${direction} level-${level}`, title: sentence(token) }, token.token);
  });
}

function sentence(token) {
  const before = percent(token.logprob);
  const after = percent(token.aligned_logprob);
  return `${before} without steering, ${after} with it`;
}

function percent(logprob) {
  return `${short(100 * Math.exp(logprob))} %`;
}
