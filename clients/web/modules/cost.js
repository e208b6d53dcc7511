/** The tokens and seconds of each answer, side by side. */

import { el, short, words } from "./dom.js";
import { KINDS } from "./request.js";

// Keys of `align.usage` that belong to a row below.
const COUNTED = [
  "context_tokens",
  "candidate_tokens",
  "saved_tokens",
  "reward_tokens",
  "judge_prompt_tokens",
  "judge_completion_tokens",
];

const TOKENS = [
  ["prompt", ({ usage }) => usage?.prompt_tokens],
  ["returned", returned],
  ["rejected", ({ usage }) => usage?.completion_tokens_details?.rejected_prediction_tokens],
  ["read as context", ({ report }) => report?.usage.context_tokens],
  ["read by reward models", ({ report }) => report?.usage.reward_tokens],
  ["judged: read", ({ report }) => report?.usage.judge_prompt_tokens],
  ["judged: generated", ({ report }) => report?.usage.judge_completion_tokens],
  ["saved by stopping early", ({ report }) => report?.usage.saved_tokens],
];

const SECONDS = [
  ["drawing", ({ report }) => report?.timing.generate_seconds],
  ["scoring", ({ report }) => report?.timing.score_seconds],
  ["on the server", ({ report }) => report?.timing.total_seconds],
  ["until the first text, here", (answer) => between(answer.start, answer.firstToken)],
  ["until the end, here", (answer) => between(answer.start, answer.end)],
];

function returned({ usage }) {
  return usage?.completion_tokens_details?.accepted_prediction_tokens ?? usage?.completion_tokens;
}

function between(start, end) {
  return end === null ? undefined : (end - start) / 1000;
}

/**
 * Show the table of costs.
 * @param {HTMLElement} place
 * @param {object} state
 */
export function showCost(place, state) {
  const kinds = Object.keys(KINDS).filter((kind) => state.answers[kind]?.usage);
  if (!kinds.length) {
    place.replaceChildren(el("p", { class: "hint" }, "After an answer, its cost stands here."));
    return;
  }
  const answers = kinds.map((kind) => state.answers[kind]);
  const further = furtherUsage(answers);
  place.replaceChildren(
    el(
      "table",
      {},
      el("caption", {}, "Tokens and seconds of each answer"),
      head(kinds),
      part("Tokens", [...TOKENS, ...further], answers),
      part("Seconds", SECONDS, answers),
    ),
  );
}

/** Return rows for counts that this page has no name for. */
function furtherUsage(answers) {
  const keys = new Set(answers.flatMap(({ report }) => Object.keys(report?.usage ?? {})));
  const unnamed = [...keys].filter((key) => !COUNTED.includes(key));
  return unnamed.map((key) => [
    words(key.replace(/_tokens$/, "")).toLowerCase(),
    ({ report }) => report?.usage[key],
  ]);
}

function head(kinds) {
  const cells = kinds.map((kind) => el("th", { scope: "col" }, KINDS[kind].title));
  return el("thead", {}, el("tr", {}, el("td", {}), ...cells));
}

/** Return the rows under one heading; rows without any number are left out. */
function part(title, rows, answers) {
  const body = el("tbody", {});
  const heading = { scope: "rowgroup", colspan: answers.length + 1 };
  body.append(el("tr", {}, el("th", heading, title)));
  for (const [name, read] of rows) {
    const values = answers.map(read);
    if (!values.some((value) => typeof value === "number")) continue;
    const cells = values.map((value) => el("td", {}, short(value)));
    body.append(el("tr", {}, el("th", { scope: "row" }, name), ...cells));
  }
  return body;
}
