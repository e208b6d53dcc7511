/** The requests that the page sends, made from the state. */

/** The answers to one question. `title` and `note` are read by people. */
export const KINDS = {
  plain: { title: "Plain", note: "the model as it is" },
  greedy: { title: "Greedy", note: "the likeliest token each time" },
  aligned: { title: "Aligned", note: "with the settings of this page" },
};

/**
 * Return the messages of the current question.
 * @param {object} state
 * @returns {{role: string, content: string}[]}
 */
export function messagesOf(state) {
  const { system } = state.sampling;
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  return [...first, ...state.history, { role: "user", content: state.question }];
}

/**
 * Return the body of one kind of answer, without what only the page needs.
 * @param {object} state
 * @param {"plain"|"greedy"|"aligned"} kind
 */
export function bodyOf(state, kind) {
  const { model, seed, temperature, max_tokens } = state.sampling;
  const body = { model, messages: messagesOf(state) };
  if (max_tokens !== null) body.max_tokens = max_tokens;
  if (kind === "greedy") body.temperature = 0;
  else if (temperature !== null) body.temperature = temperature;
  if (seed !== null) body.seed = seed;
  if (kind === "aligned" && Object.keys(state.align).length) body.align = state.align;
  return body;
}

/**
 * Return the body as the page sends it: streamed, with usage, texts of candidates, and logprobs
 * where steering has changed them.
 * @param {object} state
 * @param {"plain"|"greedy"|"aligned"} kind
 */
export function streamedBody(state, kind) {
  const body = bodyOf(state, kind);
  body.stream = true;
  body.stream_options = { include_usage: true };
  if (body.align) {
    body.align = { ...body.align, details: "candidates" };
    if (isSteered(state) && hasLogprobs(state.catalog)) body.logprobs = true;
  }
  return body;
}

/** Return true if a method of the request changes the logits. */
export function isSteered(state) {
  const preset = state.catalog.presets[state.align.preset] ?? {};
  const names = [...Object.keys(state.align), ...Object.keys(preset)];
  return names.some((name) => state.catalog.methods[name]?.stage === "steer");
}

function hasLogprobs(catalog) {
  const possible = [...catalog.capabilities, ...catalog.unknown_capabilities];
  return possible.includes("logprobs");
}
