/** The API key. It is kept in this browser only, separately for each address of a server. */

/** @returns {string} The address of the server, with its base path and a slash at the end. */
export function baseUrl() {
  return new URL(".", document.baseURI).href;
}

function place() {
  return `infer-align key ${baseUrl()}`;
}

/** @returns {string} The stored key, or "". */
export function storedKey() {
  try {
    return localStorage.getItem(place()) ?? "";
  } catch {
    // The browser forbids storage.
    return "";
  }
}

/**
 * Store a key. An empty key removes the stored one.
 * @param {string} key
 */
export function storeKey(key) {
  try {
    if (key) localStorage.setItem(place(), key);
    else localStorage.removeItem(place());
  } catch {
    // The browser forbids storage: the key must be typed again on each page.
  }
}
