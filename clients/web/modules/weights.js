/** The weights of a profile as bars: each within its bounds, with its uncertainty. */

import { el, short, svg } from "./dom.js";

/**
 * Return a picture of what a profile knows. It moves as the person chooses.
 * @returns {{node: HTMLElement, show: (knowledge: object|null) => void}}
 */
export function weightsPicture() {
  const rows = new Map();
  const list = el("div", { class: "weights" });
  return {
    node: list,
    show(knowledge) {
      const entries = knowledge ? entriesOf(knowledge) : [];
      const names = new Set(entries.map((entry) => entry.name));
      for (const [name, row] of rows) {
        if (names.has(name)) continue;
        row.node.remove();
        rows.delete(name);
      }
      for (const entry of entries) {
        if (!rows.has(entry.name)) {
          rows.set(entry.name, weightRow(entry.name));
          list.append(rows.get(entry.name).node);
        }
        rows.get(entry.name).show(entry);
      }
    },
  };
}

/** Return the weights of rewards and attributes, then the scales of traits. */
function entriesOf({ weights, uncertainty, bounds, scales }) {
  const entries = Object.entries(weights).map(([name, value]) => ({
    name,
    value,
    deviation: own(uncertainty, name) ?? null,
    bounds: own(bounds, name) ?? null,
  }));
  for (const [trait, learned] of Object.entries(scales ?? {})) {
    entries.push({
      name: `trait ${trait}`,
      value: learned.scale,
      deviation: learned.uncertainty,
      bounds: learned.bounds,
    });
  }
  return entries;
}

/** Return an entry of an object; undefined for what every object has, such as "constructor". */
function own(object, name) {
  return Object.hasOwn(object, name) ? object[name] : undefined;
}

function weightRow(name) {
  const picture = svg("svg", { class: "dots", role: "img" });
  const spread = svg("rect", { class: "spread", y: "35%", height: "30%" });
  const zero = svg("line", { class: "zero", y1: "15%", y2: "85%" });
  const point = svg("circle", { class: "weight", cy: "50%", r: 6 });
  const axis = svg("line", { class: "axis", x1: "2%", x2: "98%", y1: "50%", y2: "50%" });
  picture.append(axis, zero, spread, point);
  const number = el("span", { class: "number" });
  return {
    node: el("div", { class: "score" }, el("span", { class: "reward" }, name), picture, number),
    show(entry) {
      const range = rangeOf(entry);
      const place = (value) => percent(Math.min(Math.max(value, range.low), range.high), range);
      const left = place(entry.value - (entry.deviation ?? 0));
      const right = place(entry.value + (entry.deviation ?? 0));
      set(spread, { x: `${left}%`, width: `${right - left}%` });
      set(zero, { x1: `${place(0)}%`, x2: `${place(0)}%` });
      set(point, { cx: `${place(entry.value)}%` });
      number.textContent = short(entry.value);
      picture.setAttribute("aria-label", label(entry));
    },
  };
}

/** Return the ends of the axis: the bounds and 0. */
function rangeOf({ value, bounds }) {
  const ends = [0, value, ...(bounds ?? [])];
  const low = Math.min(...ends);
  const high = Math.max(...ends);
  return high > low ? { low, high } : { low: low - 1, high: high + 1 };
}

function percent(value, { low, high }) {
  return 4 + (92 * (value - low)) / (high - low);
}

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
}

/** Return the entry in words. */
export function label({ name, value, deviation, bounds }) {
  if (deviation === null) return `${name}: ${short(value)}; no choice says anything about it`;
  const within = bounds ? `, between ${short(bounds[0])} and ${short(bounds[1])}` : "";
  return `${name}: ${short(value)}, give or take ${short(deviation)}${within}`;
}

/** Return one sentence for each weight; the server's own ones where it has written some. */
export function sentences(knowledge) {
  if (knowledge.words.length) return knowledge.words;
  return entriesOf(knowledge).map((entry) => `${label(entry)}.`);
}
