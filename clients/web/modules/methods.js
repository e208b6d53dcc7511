/** The panel of methods, made from the answer of GET v1/align/methods. */

import { el, words } from "./dom.js";
import { fieldEditor } from "./fields.js";
import { mapEditor } from "./maps.js";
import { isMap, onlyRead, plainSchema } from "./schema.js";
import { traitEditor, traitFields } from "./traits.js";

// The stages of the flow, in groups that a person understands.
const GROUPS = [
  ["Steer the answer", ["steer", "condition"]],
  ["Draw several candidates", ["propose", "observe"]],
  ["Choose among the candidates", ["score", "select", null]],
];
// The sliders of these stages are always in view; other methods open when they are switched on.
const IN_VIEW = ["condition", "steer"];
// The profile has a section of its own; see profile.js.
const ELSEWHERE = ["profile"];
// A method with so few parameters shows them all.
const FEW = 2;

/**
 * Return the panel.
 * @param {object} catalog The answer of the server.
 * @param {() => void} onChange Called after a person has changed something.
 * @returns {{node: HTMLElement, read: () => object, clear: () => void, start: () => void}}
 *   `read` returns the methods of an `align` object. `clear` switches every method off. `start`
 *   switches on what a first visit shows. Neither calls `onChange`.
 */
export function methodsPanel(catalog, onChange) {
  const node = el("div", { class: "methods" });
  const panels = new Map();
  const entries = Object.entries(catalog.methods).filter(([name]) => !ELSEWHERE.includes(name));
  for (const [title, stages] of GROUPS) {
    const place = ([, method]) => stages.indexOf(method.stage ?? null);
    const group = entries.filter((entry) => place(entry) >= 0);
    group.sort((a, b) => place(a) - place(b));
    const usable = group.filter(([, method]) => method.available);
    if (usable.length) node.append(el("h3", {}, title));
    for (const [name, method] of usable) {
      const panel = methodPanel(name, method, catalog, onChange);
      panels.set(name, panel);
      node.append(panel.node);
    }
  }
  const missing = entries.filter(([, method]) => !method.available);
  if (missing.length) node.append(missingMethods(missing));
  return {
    node,
    read: () => readPanels(panels),
    clear: () => panels.forEach((panel) => panel.show(false)),
    start: () => panels.get("best_of_n")?.show(true),
  };
}

function readPanels(panels) {
  const align = {};
  for (const [name, panel] of panels) {
    const value = panel.read();
    if (value !== undefined) align[name] = value;
  }
  return align;
}

/** Return the switch of one method with the controls of its parameters. */
function methodPanel(name, method, catalog, onChange) {
  const box = el("input", { type: "checkbox", class: "toggle", "data-param": `align.${name}` });
  const context = {
    root: method.parameters,
    path: `align.${name}`,
    describe: (kind, key) => describe(catalog, kind, key),
    // A person who moves a slider wants the method.
    onChange() {
      show(true);
      onChange();
    },
  };
  const editors = parameterEditors(method.parameters, context);
  const body = el("div", { class: "parameters" }, ...parameterRows(editors));
  const idle = el("p", { class: "hint idle" }, "Move a slider away from 0 to use it.");
  const node = el(
    "fieldset",
    { class: IN_VIEW.includes(method.stage) ? "method open" : "method", "data-method": name },
    el("legend", {}, el("label", {}, box, ` ${words(name)}`)),
    el("p", { class: "hint" }, method.description),
    body,
    idle,
  );

  function read() {
    if (!box.checked) return undefined;
    const value = {};
    for (const editor of editors) Object.assign(value, editor.read());
    const required = method.parameters.required ?? [];
    if (!required.every((key) => key in value)) return undefined;
    // A method without any parameter would not say what it does: add what is always in view.
    const first = editors.filter((editor) => editor.isFirst);
    const chosen = Object.keys(value).length ? value : Object.assign({}, ...first.map(readWithDefault));
    return onlyRead(chosen, method.parameters);
  }

  function show(isOn) {
    box.checked = isOn;
    idle.hidden = !isOn || read() !== undefined;
    node.classList.toggle("on", isOn);
  }

  box.addEventListener("change", () => {
    show(box.checked);
    onChange();
  });
  idle.hidden = true;
  return { node, read, show };
}

/** Return a part of a method's value, with defaults too. */
function readWithDefault(editor) {
  return (editor.readWithDefault ?? editor.read)();
}

/** Return the editors of a method; `read` of each returns a part of the method's value. */
function parameterEditors(schema, context) {
  const properties = schema.properties ?? {};
  const traits = traitFields(properties);
  const editors = [];
  if (traits) {
    const editor = traitEditor(traits, properties, context);
    editors.push({ node: editor.node, read: () => editor.read() ?? {}, isFirst: true });
  }
  const keys = Object.keys(properties);
  for (const key of keys) {
    if (traits && (key === traits.scale || key === traits.prompts)) continue;
    const part = { ...context, path: `${context.path}.${key}` };
    const editor = fieldEditor(key, properties[key], part);
    const plain = plainSchema(properties[key], schema);
    const isText = plain.type === "string" && !plain.enum;
    const isRequired = (schema.required ?? []).includes(key);
    editors.push({
      node: editor.node,
      read() {
        const value = editor.read();
        return value === undefined ? {} : { [key]: value };
      },
      readWithDefault() {
        const value = editor.readWithDefault();
        return value === undefined ? {} : { [key]: value };
      },
      isFirst: isText || isRequired || keys.length <= FEW,
    });
  }
  if (isMap(schema)) {
    // Each key that is no other parameter is a name, such as that of a reward.
    const map = { ...schema, description: undefined };
    const editor = mapEditor(`Each of the ${schema["x-names"] ?? "names"}`, map, context);
    editors.unshift({ node: editor.node, read: () => editor.read() ?? {}, isFirst: true });
  }
  return editors;
}

/** Return what is always shown, then a fold with the rest. */
function parameterRows(editors) {
  const first = editors.filter((editor) => editor.isFirst).map((editor) => editor.node);
  const rest = editors.filter((editor) => !editor.isFirst).map((editor) => editor.node);
  if (!rest.length) return first;
  return [...first, el("details", {}, el("summary", {}, "More settings"), ...rest)];
}

/** Return what the configuration says about a value, a trait or a reward. */
function describe(catalog, kind, name) {
  if (kind === "values" || kind === "estimates") return catalog.values[name]?.description;
  if (kind === "traits") return catalog.traits[name]?.description;
  if (kind === "rewards") return catalog.rewards[name]?.description;
  return undefined;
}

/** Return a fold with the methods that need more configuration, and what they need. */
function missingMethods(missing) {
  const items = missing.map(([name, method]) => {
    const fix = method.fix ? el("pre", {}, method.fix) : null;
    const reason = `${words(name)}: ${method.reason}.`;
    return el("li", {}, reason, fix ? " Add to the configuration:" : null, fix);
  });
  const summary = el("summary", {}, `Not available here: ${missing.length}`);
  return el("details", { class: "missing" }, summary, el("ul", {}, ...items));
}
