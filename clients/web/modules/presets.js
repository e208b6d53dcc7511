/** The list of presets. */

import { byId, el } from "./dom.js";

/**
 * List the presets of the server.
 * @param {object} catalog
 */
export function showPresets(catalog) {
  const names = Object.keys(catalog.presets);
  byId("presets").hidden = names.length === 0;
  const options = names.map((name) => el("option", { value: name }, name));
  byId("preset").replaceChildren(el("option", { value: "" }, "none"), ...options);
  showPreset(catalog);
}

/** Show what the chosen preset holds. */
export function showPreset(catalog) {
  const name = chosenPreset();
  const content = byId("preset-content");
  content.hidden = !name;
  if (!name) return;
  const body = catalog.preset_bodies[name];
  const preset = Object.keys(body ?? {}).length ? { body } : {};
  content.textContent = JSON.stringify({ ...catalog.presets[name], ...preset }, null, 1);
}

/** @returns {string} The chosen preset, or "". */
export function chosenPreset() {
  return byId("preset").value;
}
