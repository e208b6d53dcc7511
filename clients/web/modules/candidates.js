/** The candidates of the aligned answer, best first. */

import { axes, dots } from "./dots.js";
import { el, short, words } from "./dom.js";

// Keys of the report that this page shows by itself. Anything else is shown as it is.
const SHOWN = [
  "methods",
  "selected",
  "dropped",
  "partial",
  "reason",
  "direction",
  "candidates",
  "usage",
  "timing",
];

/**
 * Return the candidates in the order of their rank: the selected one, then by their objective.
 * @param {object} report The `align` report.
 */
export function ranked(report) {
  const worth = ({ index, objective }) =>
    index === report.selected ? Infinity : (objective ?? -Infinity);
  return report.candidates.toSorted((a, b) => compare(worth(b), worth(a)) || a.index - b.index);
}

function compare(left, right) {
  if (left === right) return 0;
  return left < right ? -1 : 1;
}

/**
 * Show the candidates.
 * @param {HTMLElement} place
 * @param {object|null} report
 * @param {(candidates: string[], chosen: number) => void} onPrefer Called with the texts of the
 *   candidates and the index of the one that the person prefers.
 */
export function showCandidates(place, report, onPrefer) {
  if (!report) {
    place.replaceChildren(
      el("p", { class: "hint" }, "After an aligned answer, its candidates stand here."),
    );
    return;
  }
  const ranges = axes(report.candidates);
  const texts = textsOf(report.candidates);
  const items = ranked(report).map((candidate, i) => {
    const item = candidateItem(candidate, i, report, ranges);
    const text = textOf(candidate);
    if (texts.length > 1 && text) item.append(preferButton(candidate, texts, onPrefer));
    return item;
  });
  place.replaceChildren(
    el("p", { class: "reason" }, sentence(report)),
    scaleLegend(ranges),
    el("ol", { class: "candidates" }, ...items),
    ...furtherParts(report),
  );
}

/** Return why the answer was chosen, and what is special about it. */
function sentence(report) {
  const parts = [report.reason];
  if (report.dropped) parts.push(`${report.dropped} dropped`);
  if (report.partial) parts.push("partial, because the time was up");
  return `${parts.join("; ")}.`;
}

function scaleLegend(ranges) {
  const items = [...ranges].map(([name, { low, high }]) =>
    el("li", {}, `${name}: from ${short(low)} (left) to ${short(high)} (right)`),
  );
  if (!items.length) return null;
  const text = "Each dot is the score of one member; the bar is the score of the reward.";
  return el("div", { class: "scale hint" }, text, el("ul", {}, ...items));
}

function candidateItem(candidate, rank, report, ranges) {
  const isSelected = candidate.index === report.selected;
  const name = `Candidate ${candidate.index + 1}`;
  const badge = isSelected ? el("strong", { class: "badge" }, "chosen") : null;
  const title = el("h3", {}, `${rank + 1}. ${name} `, badge);
  const rewards = Object.entries(candidate.scores).map(([reward, score]) =>
    scoreRow(reward, score, ranges.get(reward)),
  );
  const failure = candidate.error
    ? el("p", { class: "dropped" }, `Not compared: ${candidate.error}`)
    : null;
  return el(
    "li",
    { class: isSelected ? "candidate chosen" : "candidate", "data-index": candidate.index },
    title,
    el("p", { class: "facts" }, facts(candidate, report)),
    failure,
    ...rewards,
    candidateText(candidate),
  );
}

function facts(candidate, report) {
  const parts = [];
  // A lottery draws the candidate with this probability.
  const probability = report.selection?.distribution?.[candidate.index];
  if (probability !== undefined) parts.push(`probability ${short(probability)}`);
  if (candidate.objective !== null) parts.push(`objective ${short(candidate.objective)}`);
  parts.push(`${short(candidate.completion_tokens)} tokens`);
  if (candidate.finish_reason === "length") parts.push("cut at the maximum of tokens");
  for (const [attribute, weight] of Object.entries(candidate.direction ?? {})) {
    parts.push(`${attribute} ${short(weight)}`);
  }
  return parts.join(" · ");
}

function scoreRow(reward, score, range) {
  const notes = [];
  if (score.note) notes.push(score.note);
  if (typeof score.composed === "number") notes.push(`enters the sum as ${short(score.composed)}`);
  const note = notes.length ? el("span", { class: "note" }, notes.join("; ")) : null;
  return el(
    "div",
    { class: "score" },
    el("span", { class: "reward" }, reward),
    dots(reward, score, range),
    el("span", { class: "number" }, short(score.value)),
    note,
  );
}

/** Return the button by which the person prefers a candidate to all others. */
function preferButton(candidate, texts, onPrefer) {
  const label = "Prefer this one";
  const button = el("button", { type: "button", class: "prefer" }, label);
  button.setAttribute("aria-label", `${label}: candidate ${candidate.index + 1}`);
  button.addEventListener("click", () => {
    for (const other of button.closest("ol").querySelectorAll(".prefer")) other.textContent = label;
    button.textContent = "Preferred";
    onPrefer(texts, texts.indexOf(textOf(candidate)));
  });
  return button;
}

/** Return the different texts of the candidates. */
function textsOf(candidates) {
  return [...new Set(candidates.map(textOf).filter(Boolean))];
}

function textOf(candidate) {
  const message = candidate.choice?.message;
  return message?.content ?? message?.refusal ?? candidate.choice?.text;
}

function candidateText(candidate) {
  const text = textOf(candidate);
  return text ? el("p", { class: "text" }, text) : null;
}

/** Return the parts of the report that this page has no picture for, such as a lottery. */
function furtherParts(report) {
  const parts = [];
  for (const [key, value] of Object.entries(report)) {
    if (SHOWN.includes(key)) continue;
    const text = JSON.stringify(value, null, 2);
    parts.push(el("details", {}, el("summary", {}, words(key)), el("pre", {}, text)));
  }
  return parts;
}
