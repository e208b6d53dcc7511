/** The person's profile: what their choices say, the next question, and the use in requests. */

import { el, freshId, short } from "./dom.js";
import { ApiError, advice } from "./errors.js";
import { fieldEditor } from "./fields.js";
import { baseUrl } from "./key.js";
import { browserProfile, serverProfile } from "./profiledata.js";
import { sentences, weightsPicture } from "./weights.js";

// Fields of the profile that this panel sets by itself.
const OWN_FIELDS = ["id", "choices"];
const NAME_BYTES = 4;

/**
 * Return the panel.
 * @param {object} catalog The answer of GET v1/align/methods.
 * @param {object} hooks
 * @param {() => void} hooks.onChange The person has changed what requests bring.
 * @param {() => void} hooks.onLearnt A choice has changed it.
 * @param {() => object|null} hooks.questionBody The body of a question; null without a message.
 * @param {(error: ApiError) => void} hooks.onError
 */
export function profilePanel(catalog, hooks) {
  const method = catalog.methods.profile;
  const isKept = catalog.profiles.kept;
  const parameters = method.parameters;
  const name = nameField();
  const box = el("input", { type: "checkbox", "data-param": "align.profile", change: hooks.onChange });
  const picture = weightsPicture();
  const wordsList = el("ul", { class: "words" });
  const question = el("div", { class: "question" });
  const status = el("p", { role: "status", class: "profile-status" });
  const problem = el("div", { class: "error", role: "alert", hidden: true });
  const editors = furtherEditors(parameters, hooks.onChange);
  const buttons = {
    ask: el("button", { type: "button", click: () => run(ask) }, "Ask me"),
    download: el("button", { type: "button", click: () => run(download) }, "Download everything"),
    remove: el("button", { type: "button", click: () => run(remove) }, "Delete the profile"),
  };
  // What the choices say; null before the first one.
  let knowledge = null;
  let profile = open();

  function open() {
    if (isKept) return serverProfile(name.value);
    return browserProfile(parameters.properties.choices.maxItems);
  }

  /** Do one thing at a time, and show why it failed. */
  async function run(work) {
    for (const button of Object.values(buttons)) button.disabled = true;
    problem.hidden = true;
    try {
      await work();
    } catch (error) {
      showProblem(error);
    } finally {
      buttons.ask.disabled = !isKept;
      buttons.download.disabled = buttons.remove.disabled = !knowledge;
    }
  }

  function showProblem(error) {
    if (!(error instanceof ApiError)) throw error;
    problem.replaceChildren(el("p", {}, error.message), el("p", {}, advice(error)));
    problem.hidden = false;
    status.textContent = "";
    hooks.onError(error);
  }

  function learn(next) {
    knowledge = next;
    picture.show(knowledge);
    const items = knowledge ? sentences(knowledge).map((text) => el("li", {}, text)) : [];
    wordsList.replaceChildren(...items);
    status.textContent = knowledge ? `${short(knowledge.choices)} choices.` : "No choices yet.";
    hooks.onLearnt();
  }

  async function load() {
    profile = open();
    question.replaceChildren();
    learn(await profile.knowledge());
  }

  async function prefer(choice) {
    status.textContent = "Learning from your choice …";
    learn(await profile.prefer(choice));
  }

  async function ask() {
    const body = hooks.questionBody();
    if (!body) {
      status.textContent = "Type a message first: you will be asked about two answers to it.";
      return;
    }
    status.textContent = "Drawing answers, and looking for the pair that says most about you …";
    const { answers } = await profile.question(body);
    status.textContent = "Which answer do you prefer?";
    showQuestion(body.messages, answers);
  }

  function showQuestion(messages, candidates) {
    const cards = candidates.map((text, chosen) => {
      const answer = async () => {
        question.replaceChildren();
        await prefer({ messages, candidates, chosen });
        buttons.ask.disabled = false;
        buttons.ask.focus();
      };
      const label = `I prefer answer ${chosen + 1}`;
      const button = el("button", { type: "button", click: () => run(answer) }, label);
      const title = el("h3", {}, `Answer ${chosen + 1}`);
      return el("article", { class: "answer" }, title, el("p", { class: "text" }, text), button);
    });
    const skip = el("button", { type: "button", click: () => question.replaceChildren() }, "Skip");
    question.replaceChildren(...cards, skip);
    cards[0].querySelector("button").focus();
  }

  async function download() {
    const text = JSON.stringify(await profile.everything(), null, 2);
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    el("a", { href: address, download: "profile.json" }).click();
    URL.revokeObjectURL(address);
  }

  async function remove() {
    if (!confirm("Delete the profile with all its choices?")) return;
    await profile.remove();
    box.checked = false;
    await load();
    status.textContent = "The profile is deleted.";
  }

  name.addEventListener("change", () => {
    storeName(name.value);
    run(load);
  });
  const place = isKept
    ? field("Name of your profile", name, "The server keeps it, for this name and your API key.")
    : el(
        "p",
        { class: "hint" },
        "This server keeps no profiles: your choices stay in this browser, and each request brings " +
          "them along. “Ask me” needs the setting [profiles] store.",
      );
  const node = el(
    "div",
    {},
    el("p", { class: "hint" }, "Prefer a candidate, or let the server ask. Your choices become weights."),
    place,
    el("label", { class: "use" }, box, " Use my profile in the aligned answer"),
    el("details", {}, el("summary", {}, "More settings"), ...editors.map(([, each]) => each.node)),
    el("div", { class: "buttons" }, ...Object.values(buttons)),
    status,
    problem,
    question,
    picture.node,
    wordsList,
  );

  return {
    node,
    load: () => run(load),
    /** Learn that one candidate is better than the others. */
    prefer: (choice) => run(() => prefer(choice)),
    /** Return the `profile` of a request; undefined if the person does not use it. */
    read() {
      if (!box.checked) return undefined;
      const value = knowledge ? profile.inRequest() : {};
      for (const [key, editor] of editors) {
        const part = editor.read();
        if (part !== undefined) value[key] = part;
      }
      return Object.keys(value).length ? value : undefined;
    },
    /** Return {trait: 0} of the traits whose scale the choices say something about. */
    traits() {
      if (!box.checked || !catalog.methods.guidance?.available) return {};
      const scales = Object.entries(knowledge?.scales ?? {});
      const known = scales.filter(([, learned]) => learned.uncertainty !== null);
      return Object.fromEntries(known.map(([trait]) => [trait, 0]));
    },
  };
}

/** Return the editors of the fields that this panel has no control for. */
function furtherEditors(parameters, onChange) {
  const fields = Object.entries(parameters.properties).filter(([key]) => !OWN_FIELDS.includes(key));
  return fields.map(([key, schema]) => {
    const context = { root: parameters, path: `align.profile.${key}`, onChange, describe() {} };
    return [key, fieldEditor(key, schema, context)];
  });
}

function field(label, input, hint) {
  input.id = freshId("profile");
  const note = el("p", { class: "hint", id: `${input.id}-hint` }, hint);
  input.setAttribute("aria-describedby", note.id);
  return el("div", { class: "field" }, el("label", { for: input.id }, label), input, note);
}

function nameField() {
  // "profile" is the name of this field in an error of the feedback.
  const attributes = { spellcheck: "false", autocomplete: "off", "data-param": "profile" };
  const input = el("input", { type: "text", ...attributes });
  input.value = storedName();
  return input;
}

function namePlace() {
  return `infer-align profile ${baseUrl()}`;
}

/** Return the name that this browser has used before, or a new one that no one else has. */
function storedName() {
  try {
    const name = localStorage.getItem(namePlace());
    if (name) return name;
  } catch {
    // The browser forbids storage.
  }
  const bytes = crypto.getRandomValues(new Uint8Array(NAME_BYTES));
  const name = `me-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  storeName(name);
  return name;
}

function storeName(name) {
  try {
    localStorage.setItem(namePlace(), name);
  } catch {
    // The name must be typed again on the next visit.
  }
}
