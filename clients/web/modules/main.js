/** The playground: load what the server offers, and connect the parts of the page. */

import { getJson } from "./api.js";
import { showAnswers } from "./answers.js";
import { showCandidates } from "./candidates.js";
import { copyFrom } from "./copy.js";
import { extendedHistory, showConversation } from "./conversation.js";
import { showCost } from "./cost.js";
import { byId, el } from "./dom.js";
import { advice } from "./errors.js";
import { baseUrl } from "./key.js";
import { connectKeyForm } from "./keyform.js";
import { methodsPanel } from "./methods.js";
import { chosenPreset, showPreset, showPresets } from "./presets.js";
import { profilePanel } from "./profile.js";
import { messagesOf } from "./request.js";
import { rewardsPanel } from "./rewards.js";
import { createRunner } from "./run.js";
import { isEqual } from "./schema.js";
import { connectSampling, showModels } from "./sampling.js";
import { curl, preset, python } from "./snippets.js";
import { createStore, initialState } from "./store.js";

const TICK_MILLISECONDS = 500;
// Errors name a field by the newer of its two names.
const NEWER_NAMES = { max_completion_tokens: "max_tokens" };

const store = createStore(initialState());
const keyForm = connectKeyForm(load);
const runner = createRunner(store, onError);
// The controls that were made from the catalog; null until it is loaded.
let panels = null;

function onError(error) {
  if (error.status === 401) keyForm.ask();
  markControl(error.param);
}

/** Mark the control that an error names. */
function markControl(param) {
  for (const control of document.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
  }
  // An error may name a part of what a control sets.
  for (let name = NEWER_NAMES[param] ?? param ?? ""; name; name = name.slice(0, Math.max(0, name.lastIndexOf(".")))) {
    const control = document.querySelector(`[data-param="${CSS.escape(name)}"]`);
    if (!control) continue;
    control.setAttribute("aria-invalid", "true");
    for (let fold = control.closest("details"); fold; fold = fold.parentElement.closest("details")) {
      fold.open = true;
    }
    return;
  }
}

/** Load what the server offers. */
async function load() {
  store.update({ problem: null });
  try {
    const [catalog, models] = await Promise.all([
      getJson("v1/align/methods"),
      getJson("v1/models"),
    ]);
    const names = models.data.filter((model) => !model.root).map((model) => model.id);
    const sampling = { ...store.get().sampling, model: catalog.model || names[0] || "" };
    store.update({ catalog, models: names, sampling });
    showModels(store.get());
    showCatalog(catalog);
  } catch (error) {
    store.update({ problem: error });
    if (error.status === 401) keyForm.ask();
  }
}

/** Make the controls from the catalog. */
function showCatalog(catalog) {
  showPresets(catalog);
  const methods = methodsPanel(catalog, onAlignChange);
  const rewards = rewardsPanel(catalog, onAlignChange);
  const profile = profilePanel(catalog, {
    onChange: onAlignChange,
    // The answers that the person compares stay; the next one follows the profile.
    onLearnt: () => store.update({ align: readAlign() }),
    questionBody,
    onError,
  });
  panels = { methods, rewards, profile };
  byId("methods").replaceChildren(methods.node, rewards.node);
  byId("profile").replaceChildren(profile.node);
  methods.start();
  store.update({ align: readAlign() });
  profile.load();
}

/** Return the body of “ask me”: two answers to the message are compared. Null without a message. */
function questionBody() {
  const state = store.get();
  const question = byId("question").value.trim() || state.question;
  if (!question) return null;
  const { model, seed, temperature, max_tokens } = state.sampling;
  const body = { model, messages: messagesOf({ ...state, question }) };
  if (seed !== null) body.seed = seed;
  if (temperature !== null) body.temperature = temperature;
  if (max_tokens !== null) body.max_tokens = max_tokens;
  return body;
}

/** Learn which candidate of the aligned answer the person prefers. */
function prefer(candidates, chosen) {
  const { messages } = store.get().answers.aligned.body;
  panels.profile.prefer({ messages, candidates, chosen });
}

/** Return the `align` object that the controls describe. */
function readAlign() {
  const align = panels.methods.read();
  const rewards = panels.rewards.read();
  if (rewards) align.rewards = rewards;
  if (chosenPreset()) align.preset = chosenPreset();
  const profile = panels.profile.read();
  if (profile) align.profile = profile;
  const traits = panels.profile.traits();
  if (Object.keys(traits).length) {
    // A profile changes the scales of the traits that a request names.
    align.guidance = { ...align.guidance, scale: { ...traits, ...align.guidance?.scale } };
  }
  return align;
}

/** Read the controls into the store, and answer again if the person wants that. */
function onAlignChange() {
  const align = readAlign();
  if (isEqual(align, store.get().align)) return;
  store.update({ align });
  answerAgain(["aligned"]);
}

/** Draw answers to the current question again, at a change of settings. */
function answerAgain(kinds) {
  if (byId("live").checked && store.get().question) runner.answer(kinds);
}

function ask() {
  const input = byId("question");
  const question = input.value.trim();
  if (!question || !store.get().catalog) return;
  runner.cancel();
  const history = extendedHistory(store.get());
  input.value = "";
  markControl(null);
  store.update({ history, question, answers: {} });
  runner.answer();
}

function startOver() {
  runner.cancel();
  store.update({ history: [], question: "", answers: {}, running: false });
  byId("question").focus();
}

/** Say in one line what happens, for everyone and for screen readers. */
function showStatus(state) {
  const answers = Object.values(state.answers);
  const status = byId("status");
  if (state.problem) status.textContent = "";
  else if (!state.catalog) status.textContent = "Asking the server what it offers …";
  else if (state.running) status.textContent = "Answering … Esc cancels.";
  else if (answers.some((answer) => answer.error)) status.textContent = "An answer failed.";
  else if (answers.some((answer) => answer.state === "cancelled")) status.textContent = "Cancelled.";
  else if (answers.length) status.textContent = "All answers are there.";
  else status.textContent = "Ready. Ask something.";
}

function showProblem({ problem }) {
  const place = byId("problem");
  place.hidden = !problem;
  if (!problem) return;
  const retry = el("button", { type: "button", click: load }, "Try again");
  place.replaceChildren(el("p", {}, problem.message), el("p", {}, advice(problem)), retry);
}

function showButtons(state) {
  byId("send").disabled = !state.catalog;
  byId("again").disabled = !state.question;
  byId("cancel").disabled = !state.running;
}

function showSnippets(state) {
  const base = baseUrl();
  const example = state.question ? state : { ...state, question: "Why is the sky blue?" };
  byId("curl").textContent = curl(example, base);
  byId("python").textContent = python(example, base);
  byId("preset-toml").textContent = preset(state);
}

function connect() {
  const all = ["answers", "problem", "catalog", "running", "question"];
  store.watch(["answers"], (state) => showAnswers(byId("answers"), state));
  store.watch(["answers"], (state) => {
    showCandidates(byId("candidates"), state.answers.aligned?.report ?? null, prefer);
  });
  store.watch(["answers"], (state) => showCost(byId("cost"), state));
  store.watch(["history", "question"], (state) => showConversation(byId("turns"), state));
  store.watch(["align", "sampling", "question", "history"], showSnippets);
  store.watch(all, showStatus);
  store.watch(all, showButtons);
  store.watch(["problem"], showProblem);
  // The seconds of answers that run.
  setInterval(() => {
    if (store.get().running) showAnswers(byId("answers"), store.get());
  }, TICK_MILLISECONDS);
  connectSampling(store, () => answerAgain());
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") runner.cancel();
  });
  byId("cancel").addEventListener("click", () => runner.cancel());
  byId("again").addEventListener("click", () => runner.answer());
  byId("restart").addEventListener("click", startOver);
  byId("preset").addEventListener("change", () => {
    // A preset stands alone until the person switches a method on.
    if (chosenPreset()) panels.methods.clear();
    showPreset(store.get().catalog);
    onAlignChange();
  });
  for (const box of document.querySelectorAll("#compare input")) {
    box.addEventListener("change", () => onCompare(box.value, box.checked));
  }
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", () => copyFrom(byId(button.dataset.copy), button));
  }
}

/** Show or hide one kind of answer. */
function onCompare(kind, isOn) {
  const state = store.get();
  const answers = { ...state.answers };
  if (!isOn) delete answers[kind];
  store.update({ compare: { ...state.compare, [kind]: isOn }, answers });
  if (isOn) answerAgain([kind]);
}

connect();
load();
