/**
 * The two places that a person's choices may be kept in: the server's store, or this browser.
 *
 * Both have the same functions. `knowledge` is what the choices say about the person: {choices,
 * weights, uncertainty, bounds, scales, words}; null before the first choice.
 */

import { deleteJson, getJson, postJson } from "./api.js";
import { baseUrl } from "./key.js";

const FEEDBACK = "v1/align/feedback";
const NOT_FOUND = 404;

/**
 * Return the profile of a name that the server keeps.
 * @param {string} name
 */
export function serverProfile(name) {
  const path = `v1/align/profiles/${encodeURIComponent(name)}`;

  async function knowledge() {
    try {
      return await getJson(path);
    } catch (error) {
      if (error.status === NOT_FOUND) return null;
      throw error;
    }
  }

  return {
    knowledge,
    prefer: (choice) => postJson(FEEDBACK, { profile: name, ...choice }),
    async question(body) {
      // The first feedback makes a profile. It may consist of a description alone.
      if (!(await knowledge())) await postJson(FEEDBACK, { profile: name, description: "" });
      return postJson(`${path}/question`, body);
    },
    everything: () => getJson(`${path}/export`),
    remove: () => deleteJson(path),
    inRequest: () => ({ id: name }),
  };
}

/**
 * Return the profile that this browser keeps. Requests bring its choices along.
 * @param {number} limit The most choices that a request may bring.
 */
export function browserProfile(limit) {
  const place = `infer-align choices ${baseUrl()}`;
  // Where the browser forbids storage, the choices last as long as the page.
  let unstored = [];

  function read() {
    try {
      return JSON.parse(localStorage.getItem(place)) ?? unstored;
    } catch {
      return unstored;
    }
  }

  function write(choices) {
    unstored = choices;
    try {
      localStorage.setItem(place, JSON.stringify(choices));
    } catch {
      // Forbidden, or full.
    }
  }

  async function knowledge() {
    const choices = read();
    if (!choices.length) return null;
    const { messages, chosen, rejected } = choices.at(-1);
    // Scoring any two answers says what the choices have changed.
    const body = { messages, candidates: [chosen, rejected], profile: { choices } };
    const { profile } = await postJson("v1/align/score", body);
    return { scales: {}, ...profile, words: [] };
  }

  return {
    knowledge,
    async prefer({ messages, candidates, chosen }) {
      const better = candidates[chosen];
      const others = [...new Set(candidates)].filter((text) => text !== better);
      const added = others.map((rejected) => ({ messages, chosen: better, rejected }));
      write([...read(), ...added].slice(-limit));
      return knowledge();
    },
    everything: async () => ({ choices: read() }),
    remove: async () => write([]),
    inRequest: () => ({ choices: read() }),
  };
}
