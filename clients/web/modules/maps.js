/** Editors for objects whose keys are names, such as {value name: weight}. */

import { directionPicture } from "./direction.js";
import { el, freshId } from "./dom.js";
import { editorFor, numberEditor } from "./fields.js";
import { isNumber, plainSchema } from "./schema.js";

// Descriptions begin with the shape of the object, which a person sees.
const SHAPE = /^\{[^}]*\}[:;] */;

/**
 * Return an editor for an object whose keys are names.
 *
 * A number gets one row for each name that the schema lists. Anything larger, and names that are
 * not listed, are added by the person.
 * @param {string} label
 * @param {object} schema
 * @param {import("./fields.js").Context} context
 */
export function mapEditor(label, schema, context) {
  const names = schema.propertyNames?.enum ?? schema.propertyNames?.examples ?? null;
  const entry = plainSchema(schema.additionalProperties, context.root);
  const rows = new Map();
  const list = el("div", { class: "rows" });
  const node = el("fieldset", { class: "group" }, el("legend", {}, label));
  const meaning = (schema.description ?? "").replace(SHAPE, "");
  if (meaning) node.append(el("p", { class: "hint" }, meaning[0].toUpperCase() + meaning.slice(1)));
  node.append(list);

  function add(name, isRemovable) {
    if (rows.has(name)) return;
    const part = { ...context, path: `${context.path}.${name}` };
    const described = { ...entry, description: context.describe(schema["x-names"], name) };
    const editor = isNumber(entry)
      ? weightEditor(name, described, schema, part)
      : editorFor(name, described, part);
    rows.set(name, editor);
    if (isRemovable) editor.node.append(removeButton(name, editor.node));
    list.append(editor.node);
  }

  function removeButton(name, row) {
    const remove = () => {
      rows.delete(name);
      row.remove();
      context.onChange();
    };
    return el("button", { type: "button", click: remove }, `Remove ${name}`);
  }

  const isListed = names !== null && isNumber(entry);
  if (isListed) for (const name of names) add(name, false);
  else node.append(adder(label, names, (name) => add(name, true)));
  const ranges = schema["x-trained-range"];
  if (isListed && ranges) {
    const picture = directionPicture(names, ranges);
    node.append(picture.node);
    list.addEventListener("input", () => picture.show(readRows(rows) ?? {}));
  }
  if (names?.length === 0) node.append(el("p", { class: "hint" }, "None is configured."));
  return { node, read: () => readRows(rows) };
}

function readRows(rows) {
  const read = Array.from(rows, ([name, editor]) => [name, editor.read()]);
  const parts = read.filter(([, part]) => part !== undefined);
  // An assignment would lose a name such as "__proto__".
  return parts.length ? Object.fromEntries(parts) : undefined;
}

/**
 * Return an editor for the weight of one name. It starts at 0, and 0 leaves the name out.
 * @param {string} name
 * @param {object} entry The schema of the number.
 * @param {object} schema The schema of the map, which has the range of the slider.
 * @param {import("./fields.js").Context} context
 */
export function weightEditor(name, entry, schema, context) {
  const hint = schema["x-slider"] ? { "x-slider": schema["x-slider"] } : {};
  const editor = numberEditor(name, { default: 0, ...entry, ...hint }, context);
  return { node: editor.node, read: () => editor.read() || undefined };
}

/** Return a list of names, or a field to type one, and a button that adds a row of that name. */
function adder(label, names, add) {
  const id = freshId("name");
  const options = (names ?? []).map((name) => el("option", { value: name }, name));
  const input = names ? el("select", { id }, ...options) : el("input", { type: "text", id });
  const press = () => {
    const name = input.value.trim();
    if (name) add(name);
  };
  return el(
    "div",
    { class: "adder" },
    el("label", { for: id }, `Name to add to ${label}`),
    input,
    el("button", { type: "button", click: press }, "Add"),
  );
}
