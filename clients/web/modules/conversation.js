/** The earlier turns of the conversation, and the current question. */

import { el } from "./dom.js";

/**
 * Show the conversation above the answers.
 * @param {HTMLElement} place
 * @param {object} state
 */
export function showConversation(place, state) {
  const turns = state.history.map((message) => turn(message.role, message.content));
  if (state.question) turns.push(turn("user", state.question));
  place.replaceChildren(...turns);
}

function turn(role, content) {
  const name = role === "user" ? "You" : "Model";
  return el(
    "div",
    { class: `turn ${role}` },
    el("span", { class: "speaker" }, name),
    el("p", {}, content),
  );
}

/**
 * Return the history with the current question and its answer, if it has one.
 *
 * The conversation goes on with the aligned answer, else with the plain one.
 * @param {object} state
 */
export function extendedHistory(state) {
  const kinds = ["aligned", "plain", "greedy"];
  const answers = kinds.map((kind) => state.answers[kind]);
  const answer = answers.find((each) => each?.state === "done" && each.text);
  if (!answer) return state.history;
  return [
    ...state.history,
    { role: "user", content: state.question },
    { role: "assistant", content: answer.text },
  ];
}
