/** The editor of guidance: a slider for each trait, configured or typed by the person. */

import { el, freshId } from "./dom.js";
import { numberEditor, row } from "./fields.js";
import { mapEditor } from "./maps.js";
import { plainSchema } from "./schema.js";

/**
 * Return the two fields of a method that belong together if it takes traits, else null.
 * @param {Object<string, object>} properties The properties of the method's schema.
 * @returns {{scale: string, prompts: string}|null} The names of the fields.
 */
export function traitFields(properties) {
  const names = Object.keys(properties);
  const scale = names.find((name) => properties[name]["x-names"] === "traits");
  if (!scale || !names.includes("traits")) return null;
  return { scale, prompts: "traits" };
}

/**
 * Return an editor that reads {scale: {trait: number}, traits: {trait: prompts}}.
 * @param {{scale: string, prompts: string}} fields From `traitFields`.
 * @param {Object<string, object>} properties
 * @param {import("./fields.js").Context} context
 */
export function traitEditor(fields, properties, context) {
  const schema = properties[fields.scale];
  const scalePath = `${context.path}.${fields.scale}`;
  const configured = mapEditor("Traits", schema, { ...context, path: scalePath });
  const typed = new Set();
  const list = el("div", { class: "rows" });
  const press = () => addTrait(list, typed, schema, { ...context, path: scalePath }).focus();
  const button = el("button", { type: "button", click: press }, "Type a trait of your own");
  return {
    node: el("div", {}, configured.node, list, button),
    read() {
      const read = Array.from(typed, (trait) => trait.read());
      const used = read.filter(({ weight, texts }) => weight && texts.prompt);
      // Assignments would lose a name such as "__proto__".
      const scales = Object.fromEntries(used.map(({ name, weight }) => [name, weight]));
      const prompts = Object.fromEntries(used.map(({ name, texts }) => [name, texts]));
      const scale = { ...configured.read(), ...scales };
      if (!Object.keys(scale).length) return undefined;
      const value = { [fields.scale]: scale };
      if (used.length) value[fields.prompts] = prompts;
      return value;
    },
  };
}

/** Add the rows of one trait, and return the field that a person fills first. */
function addTrait(list, typed, schema, context) {
  const number = `${typed.size + 1}`;
  const name = el("input", { type: "text", change: context.onChange });
  name.value = `trait ${number}`;
  const prompt = el("textarea", { rows: 2, change: context.onChange });
  const opposite = el("textarea", { rows: 2, change: context.onChange });
  const weights = plainSchema(schema.additionalProperties, context.root);
  const slider = { ...weights, default: 1, "x-slider": schema["x-slider"] };
  const weight = numberEditor("Scale", slider, context);
  const trait = {
    read() {
      const texts = { prompt: prompt.value.trim() };
      if (opposite.value.trim()) texts.negative_prompt = opposite.value.trim();
      return { name: name.value.trim() || `trait ${number}`, weight: weight.read(), texts };
    },
  };
  typed.add(trait);
  const remove = () => {
    typed.delete(trait);
    node.remove();
    context.onChange();
  };
  const heading = freshId("trait");
  const node = el(
    "fieldset",
    { class: "group", id: heading },
    el("legend", {}, `Your trait ${number}`),
    row("Name", name, null, context.path),
    row("What to ask for", prompt, "Such as: Answer like a cheerful pirate.", context.path),
    row("The opposite, if you like", opposite, "Default: the request as it is.", context.path),
    weight.node,
    el("button", { type: "button", click: remove }, `Remove trait ${number}`),
  );
  list.append(node);
  return prompt;
}
