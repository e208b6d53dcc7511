/** Make elements. Text is always set as text, never parsed as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an HTML element.
 * @param {string} name The name of the tag.
 * @param {Object<string, unknown>} [attributes] Attributes. A function is a listener for the event
 *   of that name. true is an attribute without a value; false, null and undefined are left out.
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** Make an SVG element; see `el`. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(key, String(value));
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** @returns {HTMLElement} The element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

let lastId = 0;

/** @returns {string} An id that no other element has. */
export function freshId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/** Return a name of the API as words: "best_of_n" becomes "Best of n", "vas" becomes "VAS". */
export function words(name) {
  const text = name.replaceAll("_", " ");
  if (text.length <= 3) return text.toUpperCase();
  return text[0].toUpperCase() + text.slice(1);
}

/** Return a number with at most three significant digits after a point; "–" for none. */
export function short(number) {
  if (typeof number !== "number" || !Number.isFinite(number)) return "–";
  if (Number.isInteger(number)) return number.toLocaleString("en");
  if (Math.abs(number) >= 100) return number.toFixed(1);
  return String(Number(number.toPrecision(3)));
}
