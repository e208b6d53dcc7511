/** Calls of the public API. All addresses are relative to the page, so a base path works. */

import { ApiError, errorOf } from "./errors.js";
import { baseUrl, storedKey } from "./key.js";
import { readEvents } from "./sse.js";

// The status of an error that arrives in the middle of a stream: its HTTP status was sent before.
const IN_STREAM = 200;

/**
 * Call the API.
 * @param {string} path Without a slash at the beginning, such as "v1/models".
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 * @throws {ApiError} The server refuses, or cannot be reached.
 */
async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = storedKey();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(new URL(path, baseUrl()), { ...options, headers });
  } catch (error) {
    throw connectionError(error);
  }
  if (!response.ok) {
    const text = await response.text();
    throw errorOf(response.status, text, response.headers.get("retry-after"));
  }
  return response;
}

/** Return an error of the connection in words. An abort by the page stays what it is. */
function connectionError(error) {
  if (error.name === "AbortError") return error;
  if (error instanceof ApiError) return error;
  return new ApiError("The server cannot be reached, or the connection to it was lost.");
}

/**
 * Get a JSON document.
 * @param {string} path
 * @returns {Promise<any>}
 */
export async function getJson(path) {
  const response = await call(path);
  return response.json();
}

/**
 * Post a JSON document, and return the JSON answer.
 * @param {string} path
 * @param {object} body
 * @returns {Promise<any>}
 */
export async function postJson(path, body) {
  const response = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  return response.json();
}

/**
 * Delete what stands at a path.
 * @param {string} path
 * @returns {Promise<any>}
 */
export async function deleteJson(path) {
  const response = await call(path, { method: "DELETE" });
  return response.json();
}

// The server sends a comment after each half of this time, as it does for SDKs that would give up.
const COMMENT_SECONDS = 2;

/**
 * Stream a chat completion.
 * @param {object} body
 * @param {AbortSignal} signal Aborting closes the connection, and the server stops its work.
 * @param {(chunk: any) => void} onChunk
 * @param {(comment: string) => void} onComment Called while there is nothing else to send.
 * @throws {ApiError} The request fails, at once or in the middle of the stream.
 */
export async function streamChat(body, signal, onChunk, onComment) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      ...(body.align ? { "X-Stainless-Read-Timeout": String(COMMENT_SECONDS) } : {}),
    },
    body: JSON.stringify(body),
    signal,
  });
  try {
    const onData = (data) => {
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(IN_STREAM, data);
      onChunk(chunk);
    };
    await readEvents(response.body, onData, onComment);
  } catch (error) {
    throw connectionError(error);
  }
}
