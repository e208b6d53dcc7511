/** Errors in words, with what a person can do about them. */

/** An error of the API, or of the connection to it. */
export class ApiError extends Error {
  /**
   * @param {string} message The server's own message.
   * @param {{status?: number, code?: string|null, param?: string|null, retryAfter?: string|null}} [details]
   */
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

const ADVICE = {
  401: "Type the API key of this server under “API key” at the top.",
  403: "This key is not allowed to do that. Use another key.",
  404: "Choose one of the models and presets that this page lists, or reload the page.",
  413: "Shorten the conversation.",
  424: "No candidate could be scored. Try again, or choose other rewards.",
  500: "The log of the server has the details. Try again.",
  502: "The model behind the server failed. Try again.",
  503: "Wait a little, then try again.",
  504: "Ask for fewer candidates or fewer tokens, or allow more seconds.",
};

/**
 * Return a sentence that says what to do about an error.
 * @param {ApiError} error
 */
export function advice(error) {
  if (error.status === 0) return "Check that the server runs, then try again.";
  if (error.retryAfter) return `Try again in ${error.retryAfter} s.`;
  if (error.status === 429) return "Wait a little, then try again.";
  if (error.param) return `Change ${error.param}, then answer again.`;
  return ADVICE[error.status] ?? "Try again, or change the request.";
}

/**
 * Return the error that an answer of the server describes.
 * @param {number} status
 * @param {string} text The body of the answer.
 * @param {string|null} retryAfter The header Retry-After.
 */
export function errorOf(status, text, retryAfter = null) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Something between the browser and the server answered, such as a proxy.
  }
  const message = error.message ?? `The address answered with status ${status}.`;
  return new ApiError(message, { status, code: error.code, param: error.param, retryAfter });
}
