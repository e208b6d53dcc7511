/** The text of an answer, coloured by how much steering has changed the probability of each token. */

import { el, short } from "./dom.js";

// Changes of a logprob, in nats, from which a stronger colour is used.
const LEVELS = [0.1, 0.5, 1.5, 3];

/**
 * Return the text in pieces of one token each, with its logprobs before and after steering.
 *
 * A character may be spread over several tokens; these are one piece. The token that ends an answer
 * is no part of its text.
 * @param {import("./answer.js").Answer} answer
 * @returns {{text: string, before: number, after: number}[]|null} null if nothing was steered, or
 *   if the tokens are not the text.
 */
export function pieces(answer) {
  if (!answer.tokens.some((token) => typeof token.aligned_logprob === "number")) return null;
  const parts = [];
  let pending = [];
  let length = 0;
  for (const token of answer.tokens) {
    if (length >= answer.text.length) break;
    pending.push(token);
    const text = decoded(pending);
    if (text === null) continue;
    parts.push({ text, before: sum(pending, "logprob"), after: sum(pending, "aligned_logprob") });
    length += text.length;
    pending = [];
  }
  return parts.map((part) => part.text).join("") === answer.text ? parts : null;
}

/** Return the text of tokens; null if its last character is not complete. */
function decoded(tokens) {
  if (!tokens.every((token) => token.bytes)) return tokens.map((token) => token.token).join("");
  const bytes = new Uint8Array(tokens.flatMap((token) => token.bytes));
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

function sum(tokens, field) {
  return tokens.reduce((total, token) => total + (token[field] ?? token.logprob), 0);
}

/**
 * Return the pieces as elements.
 * @param {{text: string, before: number, after: number}[]} parts From `pieces`.
 * @returns {HTMLElement[]}
 */
export function colouredPieces(parts) {
  return parts.map(({ text, before, after }) => {
    const difference = after - before;
    const level = LEVELS.filter((limit) => Math.abs(difference) >= limit).length;
    if (level === 0) return el("span", {}, text);
    const direction = difference > 0 ? "up" : "down";
    const title = `${percent(before)} without steering, ${percent(after)} with it`;
    return el("span", { class: `${direction} level-${level}`, title }, text);
  });
}

function percent(logprob) {
  return `${short(100 * Math.exp(logprob))} %`;
}
