/** Write values as TOML. */

const BARE_KEY = /^[A-Za-z0-9_-]+$/;

/** @returns {string} A key of a table, in quotes where it needs them. */
export function tomlKey(name) {
  return BARE_KEY.test(name) ? name : tomlText(name);
}

function tomlText(text) {
  // JSON escapes what TOML escapes, except the character DEL.
  return JSON.stringify(text).replaceAll("\u007f", "\\u007F");
}

/**
 * Return a value as TOML on one line; "" for null, which TOML does not have.
 * @param {unknown} value
 */
export function tomlValue(value) {
  if (Array.isArray(value)) return `[${value.map(tomlValue).join(", ")}]`;
  if (value === null || value === undefined) return "";
  if (typeof value === "object") {
    const parts = tomlPairs(value).map(([key, text]) => `${key} = ${text}`);
    return parts.length ? `{ ${parts.join(", ")} }` : "{}";
  }
  return typeof value === "string" ? tomlText(value) : String(value);
}

function tomlPairs(object) {
  const pairs = Object.entries(object).map(([key, value]) => [tomlKey(key), tomlValue(value)]);
  return pairs.filter(([, text]) => text !== "");
}

/**
 * Return a table with one line for each key.
 * @param {string} header The name between the brackets.
 * @param {object} table
 */
export function tomlTable(header, table) {
  const lines = tomlPairs(table).map(([key, text]) => `${key} = ${text}`);
  return [`[${header}]`, ...lines, ""].join("\n");
}
