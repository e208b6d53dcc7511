/** The direction that the weights of attributes make, and the range that the model was trained on. */

import { el, short, svg } from "./dom.js";

// The ends of a unit weight, with some room on both sides.
const LOW = -1.08;
const HIGH = 1.08;

/**
 * Return the weights scaled to a direction of length 1; {} if it has no length.
 * @param {Object<string, number>} weights
 */
export function unit(weights) {
  const length = Math.hypot(...Object.values(weights));
  if (!length) return {};
  return Object.fromEntries(Object.entries(weights).map(([name, weight]) => [name, weight / length]));
}

/**
 * Return a picture of the direction: one axis for each attribute, with its trained range shaded.
 * @param {string[]} names The attributes.
 * @param {Object<string, [number, number]>} ranges The configured ranges.
 * @returns {{node: HTMLElement, show: (weights: Object<string, number>) => void}}
 */
export function directionPicture(names, ranges) {
  const node = el("div", { class: "direction", hidden: true });
  return {
    node,
    show(weights) {
      const direction = unit(weights);
      node.hidden = Object.keys(direction).length === 0;
      const weightOf = (name) => (Object.hasOwn(direction, name) ? direction[name] : 0);
      const rows = names.map((name) => axis(name, weightOf(name), ranges[name]));
      node.replaceChildren(el("p", { class: "hint" }, "Only the proportions count:"), ...rows);
    },
  };
}

function axis(name, weight, range) {
  const text = `${name} ${short(weight)}${rangeText(weight, range)}`;
  const picture = svg("svg", { class: "dots", role: "img", "aria-label": text });
  if (range) {
    const [low, high] = range.map(percent);
    const box = { class: "trained", x: `${low}%`, y: "15%", width: `${high - low}%`, height: "70%" };
    picture.append(svg("rect", box));
  }
  picture.append(svg("line", { class: "axis", x1: "2%", x2: "98%", y1: "50%", y2: "50%" }));
  const x = `${percent(weight)}%`;
  picture.append(svg("line", { class: "value", x1: x, x2: x, y1: "5%", y2: "95%" }));
  return el("div", {}, el("p", { class: "hint" }, text), picture);
}

function percent(weight) {
  return (100 * (weight - LOW)) / (HIGH - LOW);
}

function rangeText(weight, range) {
  if (!range) return "";
  const [low, high] = range;
  // The ends are rounded in the configuration.
  const isInside = weight >= low - 0.005 && weight <= high + 0.005;
  const trained = `the trained range from ${short(low)} to ${short(high)}`;
  return isInside ? `, within ${trained}` : `, outside ${trained}`;
}
