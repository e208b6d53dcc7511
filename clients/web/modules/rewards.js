/** The panel of rewards: which of them score, and with what weight. */

import { el } from "./dom.js";
import { numberEditor } from "./fields.js";
import { isEqual } from "./schema.js";

const WEIGHT = {
  type: "number",
  minimum: 0,
  "x-slider": { minimum: 0, maximum: 3, step: 0.1 },
};

/**
 * Return the panel.
 * @param {object} catalog The answer of GET v1/align/methods.
 * @param {() => void} onChange
 * @returns {{node: HTMLElement, read: () => object|undefined}} `read` returns {reward: weight};
 *   undefined where the server's defaults are left as they are.
 */
export function rewardsPanel(catalog, onChange) {
  const rows = [];
  for (const [name, reward] of Object.entries(catalog.rewards)) {
    // A judge that is a method has a panel of its own.
    if (Object.hasOwn(catalog.methods, name)) continue;
    const names = reward.attributes.length
      ? reward.attributes.map((attribute) => `${name}.${attribute}`)
      : [name];
    for (const each of names) rows.push(rewardRow(each, reward, onChange));
  }
  const initial = readRows(rows);
  return {
    node: el(
      "fieldset",
      { class: "group rewards", hidden: rows.length === 0 },
      el("legend", {}, "Rewards that score"),
      el("p", { class: "hint" }, "With weight 0 a score is shown, and does not choose."),
      ...rows.map((row) => row.node),
    ),
    read() {
      const weights = readRows(rows);
      return isEqual(weights, initial) ? undefined : weights;
    },
  };
}

function rewardRow(name, reward, onChange) {
  const box = el("input", { type: "checkbox", change: onChange });
  box.checked = reward.default_weight > 0;
  const start = reward.default_weight;
  const context = {
    root: {},
    path: `align.rewards.${name}`,
    onChange() {
      box.checked = true;
      onChange();
    },
  };
  const schema = { ...WEIGHT, default: start };
  const weight = numberEditor(`Weight of ${name}`, schema, context);
  const node = el(
    "div",
    { class: "reward" },
    el("label", {}, box, ` ${name}`),
    el("p", { class: "hint" }, reward.description),
    weight.node,
  );
  return { name, node, read: () => (box.checked ? (weight.read() ?? 0) : undefined) };
}

function readRows(rows) {
  const read = rows.map((row) => [row.name, row.read()]);
  return Object.fromEntries(read.filter(([, weight]) => weight !== undefined));
}
