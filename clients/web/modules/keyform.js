/** The form for the API key in the header of a page. */

import { byId } from "./dom.js";
import { storedKey, storeKey } from "./key.js";

/**
 * Connect the form of the page.
 * @param {() => void} onChange Called after a key was stored or removed.
 * @returns {{ask: () => void}} `ask` opens the form for a person whose key is missing or wrong.
 */
export function connectKeyForm(onChange) {
  const panel = byId("key");
  const input = byId("key-input");
  const forget = byId("key-forget");
  const status = byId("key-status");

  function show() {
    const stored = Boolean(storedKey());
    forget.hidden = !stored;
    status.textContent = stored ? "A key is kept in this browser." : "No key is kept.";
  }

  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    storeKey(input.value.trim());
    input.value = "";
    panel.open = false;
    show();
    onChange();
  });
  forget.addEventListener("click", () => {
    storeKey("");
    show();
    onChange();
  });
  show();
  return {
    ask() {
      panel.open = true;
      input.focus();
    },
  };
}
