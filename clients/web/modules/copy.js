/** Copy a text to the clipboard. */

/**
 * Copy the text of an element, and say on the button if it worked.
 * @param {HTMLElement} source
 * @param {HTMLElement} button
 */
export async function copyFrom(source, button) {
  const label = button.textContent;
  const isCopied = (await copyText(source.textContent)) || copySelection(source);
  button.textContent = isCopied ? "Copied" : "Select the text and copy it";
  setTimeout(() => {
    button.textContent = label;
  }, 2000);
}

/** Return true if the browser lets the page write to the clipboard: only on secure addresses. */
async function copyText(text) {
  if (!navigator.clipboard) return false;
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Select the text and copy the selection, which works on other addresses too. */
function copySelection(source) {
  const selection = getSelection();
  selection.selectAllChildren(source);
  const isCopied = document.execCommand("copy");
  if (isCopied) selection.removeAllRanges();
  return isCopied;
}
