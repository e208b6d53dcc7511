/** The API reference: the OpenAPI document of this server as a page. */

import { getJson } from "./api.js";
import { byId, el } from "./dom.js";
import { advice } from "./errors.js";
import { connectKeyForm } from "./keyform.js";
import { resolved, schemaTree } from "./schematree.js";

const keyForm = connectKeyForm(load);

async function load() {
  const problem = byId("problem");
  problem.hidden = true;
  try {
    show(await getJson("openapi.json"));
  } catch (error) {
    byId("status").textContent = "";
    problem.hidden = false;
    problem.replaceChildren(el("p", {}, error.message), el("p", {}, advice(error)));
    if (error.status === 401) keyForm.ask();
  }
}

function show(root) {
  const routes = [];
  for (const [path, item] of Object.entries(root.paths)) {
    for (const [verb, operation] of Object.entries(item)) routes.push({ path, verb, operation });
  }
  byId("about").textContent = root.info.description;
  byId("contents").replaceChildren(el("ul", {}, ...routes.map(link)));
  byId("routes").replaceChildren(...routes.map((route) => section(route, root)));
  byId("status").textContent = `${routes.length} routes, version ${root.info.version}.`;
}

function link({ path, verb, operation }) {
  return el("li", {}, el("a", { href: `#${operation.operationId}` }, name(path, verb)));
}

function name(path, verb) {
  return `${verb.toUpperCase()} ${path}`;
}

function section({ path, verb, operation }, root) {
  const title = [el("span", { class: "verb" }, verb.toUpperCase()), " ", el("code", {}, path)];
  const key = operation.security ? el("p", { class: "hint" }, "Needs an API key.") : null;
  return el(
    "section",
    { class: "route", id: operation.operationId },
    el("h2", {}, ...title),
    el("p", {}, operation.summary),
    key,
    ...parameterParts(operation),
    ...bodyParts("Request", operation.requestBody, root),
    ...responseParts(operation, root),
  );
}

function parameterParts(operation) {
  return (operation.parameters ?? []).map((parameter) => {
    const examples = (parameter.schema.examples ?? []).join(", ");
    const text = examples ? ` in the path, such as ${examples}` : " in the path";
    return el("p", {}, el("code", {}, parameter.name), text);
  });
}

/** Return a fold with the JSON schema of a request or a response. */
function bodyParts(title, body, root) {
  const schema = body?.content?.["application/json"]?.schema;
  if (!schema) return [];
  return [el("details", {}, el("summary", {}, title), schemaTree(resolved(schema, root), root))];
}

function responseParts(operation, root) {
  const { 200: success, default: _, ...failures } = operation.responses;
  const items = Object.entries(failures).map(([status, failure]) =>
    el("li", {}, el("strong", {}, status), ` ${failure.description}`),
  );
  const summary = el("summary", {}, "Errors");
  const errors = items.length ? el("details", {}, summary, el("ul", {}, ...items)) : null;
  return [...bodyParts("Response", success, root), errors];
}

load();
