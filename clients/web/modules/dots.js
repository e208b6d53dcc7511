/** Scores of members as dots on an axis that all candidates share. */

import { short, svg } from "./dom.js";

/**
 * Return the range of each reward over all candidates.
 * @param {object[]} candidates Of the `align` report.
 * @returns {Map<string, {low: number, high: number}>}
 */
export function axes(candidates) {
  const ranges = new Map();
  for (const candidate of candidates) {
    for (const [name, score] of Object.entries(candidate.scores)) {
      const range = ranges.get(name) ?? { low: Infinity, high: -Infinity };
      for (const value of [...score.members, score.value]) {
        if (value === null) continue;
        range.low = Math.min(range.low, value);
        range.high = Math.max(range.high, value);
      }
      ranges.set(name, range);
    }
  }
  return ranges;
}

/** Return a number as a place on the axis, in percent of its width. */
function place(value, { low, high }) {
  if (high === low) return "50%";
  // Some room on both sides keeps the outer dots in the picture.
  return `${4 + (92 * (value - low)) / (high - low)}%`;
}

/**
 * Return the picture of one reward's score of one candidate.
 * @param {string} name The reward.
 * @param {{value: number|null, members: (number|null)[]}} score
 * @param {{low: number, high: number}} range From `axes`.
 * @returns {SVGElement}
 */
export function dots(name, score, range) {
  const members = score.members.filter((value) => value !== null);
  const picture = svg("svg", { class: "dots", role: "img", "aria-label": label(name, score) });
  picture.append(svg("line", { class: "axis", x1: "2%", x2: "98%", y1: "50%", y2: "50%" }));
  if (range.low < 0 && range.high > 0) {
    const zero = place(0, range);
    picture.append(svg("line", { class: "zero", x1: zero, x2: zero, y1: "15%", y2: "85%" }));
  }
  for (const value of members) {
    picture.append(svg("circle", { class: "member", cx: place(value, range), cy: "50%", r: 5 }));
  }
  if (score.value !== null) {
    const x = place(score.value, range);
    picture.append(svg("line", { class: "value", x1: x, x2: x, y1: "5%", y2: "95%" }));
  }
  return picture;
}

function label(name, score) {
  if (score.value === null) return `${name}: not scored`;
  const members = score.members.map(short).join(", ");
  return `${name}: ${short(score.value)}, from the members ${members}`;
}
