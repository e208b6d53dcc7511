/** Show a JSON schema as a tree that a person opens where it is of interest. */

import { el } from "./dom.js";

// Limits of a schema, and how they are written.
const BOUNDS = [
  ["minimum", "at least"],
  ["exclusiveMinimum", "above"],
  ["maximum", "at most"],
  ["exclusiveMaximum", "below"],
  ["minItems", "items, at least"],
  ["maxItems", "items, at most"],
  ["minLength", "characters, at least"],
  ["maxLength", "characters, at most"],
  ["minProperties", "keys, at least"],
  ["maxProperties", "keys, at most"],
];

/**
 * Return the target of a reference.
 * @param {object} schema
 * @param {object} root The OpenAPI document.
 */
export function resolved(schema, root) {
  let target = schema;
  while (target.$ref) {
    const path = target.$ref.replace("#/", "").split("/");
    target = path.reduce((part, key) => part[key], root);
  }
  return target;
}

/**
 * Return the tree of a schema.
 * @param {object} schema
 * @param {object} root The OpenAPI document.
 * @returns {HTMLElement}
 */
export function schemaTree(schema, root) {
  const target = resolved(schema, root);
  const children = childrenOf(target, root);
  if (!children.length) return el("p", {}, el("span", { class: "type" }, typeText(target, root)));
  const required = target.required ?? [];
  const items = children.map(([name, child]) => field(name, child, required.includes(name), root));
  return el("ul", { class: "fields" }, ...items);
}

/** Return one field: its name, its type, its description, and a fold with what it holds. */
function field(name, schema, isRequired, root) {
  const target = resolved(schema, root);
  const line = [
    el("code", {}, name),
    " ",
    el("span", { class: "type" }, typeText(target, root)),
    isRequired ? el("span", { class: "required" }, " required") : null,
  ];
  const description = target.description ? el("p", { class: "hint" }, target.description) : null;
  if (!childrenOf(target, root).length) return el("li", {}, ...line, description);
  const fold = el("details", {}, el("summary", {}, ...line));
  // The tree may refer to itself, so a fold is filled when it is opened for the first time.
  const fill = () => fold.append(schemaTree(target, root));
  fold.addEventListener("toggle", fill, { once: true });
  return el("li", {}, fold, description);
}

/** Return [name, schema] of what a schema holds: fields, entries, items or alternatives. */
function childrenOf(schema, root) {
  const children = Object.entries(schema.properties ?? {});
  if (typeof schema.additionalProperties === "object") {
    if (isNested(schema.additionalProperties, root)) {
      children.push(["any name", schema.additionalProperties]);
    }
  }
  if (schema.items && isNested(schema.items, root)) children.push(["each item", schema.items]);
  for (const branch of branchesOf(schema)) {
    const target = resolved(branch, root);
    if (target.type === "null") continue;
    if (branchesOf(schema).length <= 2) children.push(...childrenOf(target, root));
    else if (isNested(target, root)) children.push([target.title ?? "one of", target]);
  }
  return children;
}

function branchesOf(schema) {
  return schema.anyOf ?? schema.oneOf ?? [];
}

function isNested(schema, root) {
  return childrenOf(resolved(schema, root), root).length > 0;
}

/** Return the type, the choices, the bounds and the default of a schema in words. */
export function typeText(schema, root) {
  const parts = [typeName(schema, root)];
  for (const [key, text] of BOUNDS) {
    if (schema[key] !== undefined) parts.push(`${text} ${schema[key]}`);
  }
  if (schema.default !== undefined) parts.push(`default ${JSON.stringify(schema.default)}`);
  return parts.join(", ");
}

function typeName(schema, root) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const branches = branchesOf(schema);
  if (branches.length) {
    return branches.map((branch) => typeName(resolved(branch, root), root)).join(" | ");
  }
  if (schema.type === "array" && schema.items) {
    return `list of ${typeName(resolved(schema.items, root), root)}`;
  }
  const names = [schema.type ?? "any value"].flat();
  return names.join(" | ");
}
