/** Editors for lists: one row for each item, which a person adds and removes. */

import { el } from "./dom.js";
import { editorFor } from "./fields.js";
import { plainSchema } from "./schema.js";

/**
 * Return the editor for a list.
 * @param {string} label
 * @param {object} schema
 * @param {import("./fields.js").Context} context
 */
export function listEditor(label, schema, context) {
  const entry = plainSchema(schema.items, context.root);
  const rows = new Set();
  const list = el("div", { class: "rows" });
  let added = 0;

  function add() {
    added += 1;
    const name = `${label} ${added}`;
    const editor = editorFor(name, entry, { ...context, path: `${context.path}.${added - 1}` });
    const remove = () => {
      rows.delete(editor);
      editor.node.remove();
      context.onChange();
    };
    editor.node.append(el("button", { type: "button", click: remove }, `Remove ${name}`));
    rows.add(editor);
    list.append(editor.node);
  }

  const hint = schema.description ? el("p", { class: "hint" }, schema.description) : null;
  const button = el("button", { type: "button", click: add }, `Add to ${label}`);
  return {
    node: el("fieldset", { class: "group" }, el("legend", {}, label), hint, list, button),
    read() {
      const values = [...rows].map((row) => row.read()).filter((value) => value !== undefined);
      return values.length ? values : undefined;
    },
  };
}
