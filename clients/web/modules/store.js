/**
 * The one place that holds the state of the page. Parts of the page read it, change it with
 * `update`, and are called after each change.
 */

/**
 * Make a store.
 * @template {object} State
 * @param {State} initial
 */
export function createStore(initial) {
  let state = initial;
  const listeners = new Set();
  return {
    /** @returns {State} The state as it is now. Do not change it in place. */
    get: () => state,
    /** @param {Partial<State>} changes The fields to replace. */
    update(changes) {
      state = { ...state, ...changes };
      for (const listener of listeners) listener(state, changes);
    },
    /**
     * Call a function after each change of some fields.
     * @param {string[]} fields
     * @param {(state: State) => void} listener
     */
    watch(fields, listener) {
      listeners.add((current, changes) => {
        if (fields.some((field) => field in changes)) listener(current);
      });
    },
  };
}

/** @returns {object} The state of a playground before anything is loaded. */
export function initialState() {
  return {
    // The answer of GET v1/align/methods, and the names of the models.
    catalog: null,
    models: [],
    // The error that kept the page from loading these, or null.
    problem: null,
    sampling: { model: "", system: "", seed: 1, temperature: null, max_tokens: 200 },
    // The `align` object that the controls describe.
    align: {},
    compare: { plain: true, greedy: true, aligned: true },
    // Earlier turns of the conversation, as messages of the API.
    history: [],
    question: "",
    // {kind: Answer} of the current question; see answer.js.
    answers: {},
    running: false,
  };
}
