/** The request of the page as code that a person can copy. None of it contains the API key. */

import { bodyOf } from "./request.js";
import { tomlTable } from "./toml.js";

const KEY = "INFER_ALIGN_API_KEY";

/**
 * Return the request as a command of the shell.
 * @param {object} state
 * @param {string} base The address of the server, with a slash at the end.
 */
export function curl(state, base) {
  const json = JSON.stringify(bodyOf(state, "aligned"), null, 2);
  // In the shell, a single quote ends the text.
  const quoted = json.replaceAll("'", "'\\''");
  return [
    `curl '${base}v1/chat/completions' \\`,
    "  -H 'Content-Type: application/json' \\",
    `  -H "Authorization: Bearer $${KEY}" \\`,
    `  -d '${quoted}'`,
    "",
  ].join("\n");
}

/** Return the request as a program with OpenAI's SDK. */
export function python(state, base) {
  const { align, ...fields } = bodyOf(state, "aligned");
  const lines = Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (align) lines.push(`    extra_body={"align": ${literal(align, 1)}},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `key = os.environ.get("${KEY}", "unused")`,
    `client = OpenAI(base_url="${base}v1", api_key=key)`,
    "answer = client.chat.completions.create(",
    ...lines,
    ")",
    "print(answer.choices[0].message.content)",
    ...(align ? ['print(answer.align["reason"])'] : []),
    "",
  ].join("\n");
}

/** Return the settings as a preset of the configuration file. */
export function preset(state) {
  const { preset: name, ...own } = state.align;
  const inherited = state.catalog?.presets[name] ?? {};
  const body = { ...state.catalog?.preset_bodies[name] };
  const { temperature, max_tokens } = state.sampling;
  if (temperature !== null) body.temperature = temperature;
  if (max_tokens !== null) body.max_tokens = max_tokens;
  const table = { ...inherited, ...own };
  if (Object.keys(body).length) table.body = body;
  return tomlTable("presets.mine", table);
}

/** Return a JSON value as a literal of Python. */
function literal(value, depth) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const parts = isList
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${literal(item, depth + 1)}`);
  const [open, close] = isList ? "[]" : "{}";
  const line = `${open}${parts.join(", ")}${close}`;
  if (line.length <= 70 && !line.includes("\n")) return line;
  const indent = "    ".repeat(depth);
  const rows = parts.map((part) => `${indent}    ${part},\n`);
  return `${open}\n${rows.join("")}${indent}${close}`;
}
