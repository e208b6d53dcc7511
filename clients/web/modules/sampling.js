/** The controls for the model, the seed and the length of answers. */

import { byId, el } from "./dom.js";

const SEEDS = 1_000_000;

/**
 * Connect the controls of the page to the store.
 * @param {ReturnType<import("./store.js").createStore>} store
 * @param {() => void} onChange Called after a person has changed something.
 */
export function connectSampling(store, onChange) {
  const fields = {
    model: byId("model"),
    system: byId("system"),
    seed: byId("seed"),
    temperature: byId("temperature"),
    max_tokens: byId("max-tokens"),
  };

  function read() {
    store.update({
      sampling: {
        model: fields.model.value,
        system: fields.system.value,
        seed: numberOf(fields.seed),
        temperature: numberOf(fields.temperature),
        max_tokens: numberOf(fields.max_tokens),
      },
    });
    onChange();
  }

  for (const field of Object.values(fields)) field.addEventListener("change", read);
  byId("new-seed").addEventListener("click", () => {
    fields.seed.value = Math.floor(Math.random() * SEEDS);
    read();
  });
}

/** Return the number in a field, or null if it is empty. */
function numberOf(input) {
  return input.value === "" ? null : input.valueAsNumber;
}

/**
 * List the models. A model with a preset is chosen by the list of presets instead.
 * @param {object} state
 */
export function showModels(state) {
  const options = state.models.map((name) => el("option", { value: name }, name));
  byId("model").replaceChildren(...options);
  byId("model").value = state.sampling.model;
}
