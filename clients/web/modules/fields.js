/**
 * Controls for the parameters of a method, made from their JSON schema.
 *
 * An editor is {node, read}: the element, and a function that returns the value, or undefined where
 * nothing is set. A value that equals the default is undefined too, so requests stay short.
 */

import { el, freshId, words } from "./dom.js";
import { listEditor } from "./lists.js";
import { mapEditor } from "./maps.js";
import { isEqual, isMap, isNumber, onlyRead, plainSchema, sliderRange } from "./schema.js";

// A text that may be longer than this is typed into several lines.
const LINE_LENGTH = 300;

/**
 * @typedef {object} Context
 * @property {object} root The schema that holds the definitions.
 * @property {string} path The name of the field in a request, such as "align.best_of_n.n".
 * @property {() => void} onChange Called after a person has changed something.
 * @property {(kind: string, name: string) => string} describe What a configured name means.
 */

/**
 * Return the editor for one field.
 * @param {string} name The key of the field.
 * @param {object} schema
 * @param {Context} context
 */
export function fieldEditor(name, schema, context) {
  const plain = plainSchema(schema, context.root);
  const editor = editorFor(words(name), plain, context);
  const initial = plain.default ?? null;
  return {
    node: editor.node,
    readWithDefault: editor.read,
    read() {
      const value = editor.read();
      return isEqual(value ?? null, initial) ? undefined : value;
    },
  };
}

/**
 * Return the editor for a value of any schema.
 * @param {string} label
 * @param {object} schema From `plainSchema`.
 * @param {Context} context
 */
export function editorFor(label, schema, context) {
  if (schema.enum) return choiceEditor(label, schema, context);
  if (schema.type === "boolean") return switchEditor(label, schema, context);
  if (isNumber(schema)) return numberEditor(label, schema, context);
  if (schema.type === "string") return textEditor(label, schema, context);
  if (isMap(schema)) return mapEditor(label, schema, context);
  if (schema.type === "object") return objectEditor(label, schema, context);
  if (schema.type === "array" && schema.items) return listEditor(label, schema, context);
  return jsonEditor(label, schema, context);
}

/**
 * Return the rows of an object with fixed keys.
 * @returns {{node: HTMLElement, read: () => object|undefined}}
 */
export function objectEditor(label, schema, context) {
  const editors = Object.entries(schema.properties ?? {}).map(([key, field]) => [
    key,
    fieldEditor(key, field, { ...context, path: `${context.path}.${key}` }),
  ]);
  const rows = editors.map(([, editor]) => editor.node);
  const node = el("fieldset", { class: "group" }, el("legend", {}, label), ...rows);
  return {
    node,
    read() {
      const value = {};
      for (const [key, editor] of editors) {
        const part = editor.read();
        if (part !== undefined) value[key] = part;
      }
      const read = onlyRead(value, schema);
      return Object.keys(read).length ? read : undefined;
    },
  };
}

/** Return a row: the label, the control, and the description that belongs to it. */
export function row(label, control, description, path) {
  const id = freshId("field");
  control.id = id;
  control.dataset.param = path;
  const parts = [el("label", { for: id }, label), control];
  if (description) {
    const hint = el("p", { class: "hint", id: `${id}-hint` }, description);
    control.setAttribute("aria-describedby", hint.id);
    parts.push(hint);
  }
  return el("div", { class: "field" }, ...parts);
}

function choiceEditor(label, schema, context) {
  const select = el("select", { change: context.onChange });
  if (schema.nullable || schema.default === undefined) {
    select.append(el("option", { value: "" }, "as configured"));
  }
  for (const [i, choice] of schema.enum.entries()) {
    const option = el("option", { value: i }, String(choice));
    option.selected = choice === schema.default;
    select.append(option);
  }
  return {
    node: row(label, select, schema.description, context.path),
    read: () => (select.value === "" ? undefined : schema.enum[Number(select.value)]),
  };
}

function switchEditor(label, schema, context) {
  const box = el("input", { type: "checkbox", change: context.onChange });
  box.checked = schema.default === true;
  const node = row(label, box, schema.description, context.path);
  node.classList.add("switch");
  return { node, read: () => box.checked };
}

function textEditor(label, schema, context) {
  const isLong = (schema.maxLength ?? 0) > LINE_LENGTH;
  const input = isLong
    ? el("textarea", { rows: 2, change: context.onChange })
    : el("input", { type: "text", change: context.onChange });
  input.value = schema.default ?? "";
  return {
    node: row(label, input, schema.description, context.path),
    read: () => (input.value.trim() === "" ? undefined : input.value),
  };
}

/** Return an editor for a value that has no control of its own: it is typed as JSON. */
function jsonEditor(label, schema, context) {
  const input = el("input", { type: "text", spellcheck: "false", change: context.onChange });
  const initial = schema.default;
  if (initial !== undefined && initial !== null) input.value = JSON.stringify(initial);
  const hint = [schema.description, "Written as JSON."].filter(Boolean).join(" ");
  return {
    node: row(label, input, hint, context.path),
    read() {
      const text = input.value.trim();
      if (text === "") return undefined;
      try {
        return JSON.parse(text);
      } catch {
        return text;
      }
    },
  };
}

/**
 * Return an editor for a number: a field to type into, and a slider where the range is closed.
 * @param {string} label
 * @param {object} schema
 * @param {Context} context
 */
export function numberEditor(label, schema, context) {
  const range = sliderRange(schema);
  const number = el("input", {
    type: "number",
    min: schema.minimum,
    max: schema.maximum,
    step: schema.type === "integer" ? 1 : "any",
    change: context.onChange,
  });
  if (schema.default !== undefined && schema.default !== null) number.value = schema.default;
  const node = row(label, number, schema.description, context.path);
  if (range) node.insertBefore(slider(label, range, number, context), number);
  return { node, read: () => numberOf(number, schema) };
}

/** Return the number in a field; undefined if it is empty. */
function numberOf(input, schema) {
  if (input.value === "" || Number.isNaN(input.valueAsNumber)) return undefined;
  return schema.type === "integer" ? Math.round(input.valueAsNumber) : input.valueAsNumber;
}

/** Return a slider that moves together with a number field. */
function slider(label, range, number, context) {
  const control = el("input", {
    type: "range",
    min: range.minimum,
    max: range.maximum,
    step: range.step,
    "aria-label": `${label}, slider`,
    change: context.onChange,
  });
  control.value = number.value === "" ? range.minimum : number.value;
  control.addEventListener("input", () => {
    number.value = control.value;
  });
  number.addEventListener("input", () => {
    if (number.value !== "") control.value = number.value;
  });
  return control;
}
