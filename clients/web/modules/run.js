/** Send the requests of a question, side by side, and cancel them. */

import { ended, isRunning, newAnswer, withChunk, withComment } from "./answer.js";
import { streamChat } from "./api.js";
import { KINDS, streamedBody } from "./request.js";

/**
 * Make the runner of a page.
 * @param {ReturnType<import("./store.js").createStore>} store
 * @param {(error: import("./errors.js").ApiError) => void} onError
 */
export function createRunner(store, onError) {
  // {kind: AbortController} of the requests that run.
  const running = {};

  function put(kind, answer) {
    const answers = { ...store.get().answers, [kind]: answer };
    store.update({ answers, running: Object.values(answers).some(isRunning) });
  }

  async function draw(kind) {
    running[kind]?.abort();
    const controller = new AbortController();
    running[kind] = controller;
    let answer = newAnswer(streamedBody(store.get(), kind));
    put(kind, answer);
    // A newer request of the same kind may have taken the place of this one.
    const isCurrent = () => running[kind] === controller;
    try {
      const step = (next) => {
        answer = next;
        if (isCurrent()) put(kind, answer);
      };
      await streamChat(
        answer.body,
        controller.signal,
        (chunk) => step(withChunk(answer, chunk)),
        (comment) => step(withComment(answer, comment)),
      );
      answer = ended(answer, "done");
    } catch (error) {
      const isCancelled = controller.signal.aborted;
      answer = isCancelled ? ended(answer, "cancelled") : ended(answer, "failed", error);
      if (!isCancelled) onError(error);
    }
    if (isCurrent()) put(kind, answer);
  }

  return {
    /**
     * Draw the answers that the person compares.
     * @param {string[]} [kinds] Only these; the other answers stay.
     */
    async answer(kinds = Object.keys(KINDS)) {
      const { compare } = store.get();
      await Promise.all(kinds.filter((kind) => compare[kind]).map(draw));
    },
    /** Close the connections of all requests that run. The server then stops its work. */
    cancel() {
      for (const controller of Object.values(running)) controller.abort();
    },
  };
}
