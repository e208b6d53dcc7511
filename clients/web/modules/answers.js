/** The answers side by side, each in a card of its own. */

import { isRunning } from "./answer.js";
import { el, short } from "./dom.js";
import { advice } from "./errors.js";
import { KINDS } from "./request.js";
import { colouredPieces, pieces } from "./tokens.js";

const STATES = {
  drawing: "Waiting for the first token",
  writing: "Writing",
  cancelled: "Cancelled",
  failed: "Failed",
};

/**
 * Show the answers of the current question.
 * @param {HTMLElement} place
 * @param {object} state
 */
export function showAnswers(place, state) {
  for (const kind of Object.keys(KINDS)) {
    const answer = state.answers[kind];
    let card = place.querySelector(`[data-kind="${kind}"]`);
    if (!answer) {
      card?.remove();
      continue;
    }
    if (!card) {
      card = newCard(kind);
      place.append(card);
    }
    fillCard(card, kind, answer);
  }
  sortCards(place);
}

/** Keep the cards in the order of the kinds. */
function sortCards(place) {
  const order = Object.keys(KINDS);
  const cards = [...place.children];
  const sorted = cards.toSorted(
    (a, b) => order.indexOf(a.dataset.kind) - order.indexOf(b.dataset.kind),
  );
  if (cards.some((card, i) => card !== sorted[i])) place.append(...sorted);
}

function newCard(kind) {
  return el(
    "article",
    { class: "answer", "data-kind": kind, "aria-labelledby": `answer-${kind}` },
    el("h3", { id: `answer-${kind}` }, KINDS[kind].title),
    el("p", { class: "hint" }, KINDS[kind].note),
    el("div", { class: "progress" }),
    el("div", { class: "text" }),
    el("div", { class: "legend" }),
    el("p", { class: "state" }),
  );
}

function fillCard(card, kind, answer) {
  card.dataset.state = answer.state;
  card.querySelector(".state").textContent = stateText(answer);
  card.querySelector(".progress").replaceChildren(...progress(kind, answer));
  const text = card.querySelector(".text");
  const legend = card.querySelector(".legend");
  legend.replaceChildren();
  if (answer.error) {
    text.replaceChildren(...errorParts(answer));
    return;
  }
  const parts = isRunning(answer) ? null : pieces(answer);
  if (parts) {
    text.replaceChildren(...colouredPieces(parts));
    legend.append(...legendParts());
  } else {
    text.textContent = answer.text;
  }
}

/** Return the error in words, below the text that had arrived. */
function errorParts(answer) {
  const code = answer.error.code ? ` (${answer.error.code})` : "";
  const message = el("p", {}, `${answer.error.message}${code}`);
  const hint = el("p", { class: "advice" }, advice(answer.error));
  return [answer.text, el("div", { class: "error", role: "alert" }, message, hint)];
}

function progress(kind, answer) {
  if (answer.state !== "drawing") return [];
  const title = `${KINDS[kind].title} answer is drawn`;
  const n = answer.body.align?.best_of_n?.n;
  // Without a number of candidates, the bar only says that something happens.
  const value = n && answer.finished ? { value: answer.finished, max: n } : {};
  return [el("progress", { "aria-label": title, ...value })];
}

function legendParts() {
  return [
    "Steering made a token ",
    el("span", { class: "up level-3" }, "likelier"),
    " or ",
    el("span", { class: "down level-3" }, "less likely"),
    ".",
  ];
}

/** Return what the server does for a request with `align`. */
function drawing({ body, finished }) {
  const n = body.align.best_of_n?.n;
  const text = n ? `Drawing ${n} candidates and comparing them` : "Drawing and comparing candidates";
  return finished ? `${text}: ${finished} are finished` : text;
}

/** Return the line below the text: what happens, or what the answer cost. */
function stateText(answer) {
  const elapsed = Math.round((performance.now() - answer.start) / 1000);
  if (answer.state === "drawing" && answer.body.align) return `${drawing(answer)}, ${elapsed} s`;
  if (isRunning(answer)) return `${STATES[answer.state]}, ${elapsed} s`;
  if (answer.state !== "done") return STATES[answer.state];
  const tokens = answer.usage?.completion_tokens;
  const seconds = (answer.end - answer.start) / 1000;
  const parts = [];
  if (tokens !== undefined) parts.push(`${short(tokens)} tokens generated`);
  parts.push(`${short(seconds)} s`);
  if (answer.finish === "length") parts.push("cut at the maximum of tokens");
  return parts.join(" · ");
}
