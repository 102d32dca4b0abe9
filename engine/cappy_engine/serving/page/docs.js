// Show what openapi.json says: operations with examples and a line for curl, then schemas.

import { find, make } from "./elements.js";
import { call, explain } from "./server.js";

const METHODS = ["get", "post", "put", "delete", "head", "options", "patch"];
const DEPTH = 5; // how deep a made-up example goes

let api = {};

// ---- Texts

/** Make paragraphs of a description, with `code` as code. */
function makeParagraphs(text = "") {
  return text.split(/\n\s*\n/).filter((part) => part.trim()).map((part) => make("p", "", ...withCode(part)));
}

function withCode(text) {
  return text.split("`").map((part, place) => (place % 2 ? make("code", "", part) : part));
}

function makePre(text) {
  const block = make("pre", "", text);
  block.tabIndex = 0; // so that the keyboard can scroll it
  return block;
}

function idOf(...parts) {
  return parts.join("-").replace(/[^A-Za-z0-9]+/g, "-").toLowerCase();
}

// ---- Schemas

function nameOf(schema) {
  return schema?.$ref?.split("/").at(-1);
}

/** Give what a part of the document is, also where it only refers to another part. */
function resolved(part = {}) {
  const steps = part.$ref?.slice(2).split("/").map((step) => step.replaceAll("~1", "/").replaceAll("~0", "~"));
  return steps ? resolved(steps.reduce((found, step) => found?.[step], api)) : part;
}

/** Say in a few words, with links to other schemas, of which type a value is. */
function describeType(schema) {
  const name = nameOf(schema);
  if (name) {
    const link = make("a", "", name);
    link.href = `#${idOf("schema", name)}`;
    return [link];
  }
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.flatMap((choice, place) => (place ? [" or ", ...describeType(choice)] : describeType(choice)));
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" or ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...describeType(schema.items ?? {})];
  return [[schema.type ?? "any value"].flat().join(" or ")];
}

function describeLimits(schema) {
  const words = { minimum: "at least", exclusiveMinimum: "more than", maximum: "at most", exclusiveMaximum: "less than" };
  const sizes = { minLength: "at least", maxLength: "at most", minItems: "at least", maxItems: "at most" };
  const found = Object.entries(words).filter(([key]) => key in schema).map(([key, word]) => `${word} ${schema[key]}`);
  for (const [key, word] of Object.entries(sizes)) {
    if (key in schema) found.push(`${word} ${schema[key]} ${key.endsWith("Items") ? "item" : "character"}${schema[key] === 1 ? "" : "s"}`);
  }
  if ("default" in schema) found.push(`${JSON.stringify(schema.default)} if left out`);
  return found;
}

/** Make a list of an object's members, or a line for another type. */
function makeSchema(schema) {
  if (!schema.properties) return make("p", "", ...describeType(schema));
  const required = new Set(schema.required ?? []);
  const list = make("dl", "members");
  for (const [name, member] of Object.entries(schema.properties)) {
    const type = make("p", "", ...describeType(member));
    const notes = [...(required.has(name) ? ["required"] : []), ...describeLimits(member)];
    if (notes.length) type.append(make("span", "quiet", `, ${notes.join(", ")}`));
    list.append(make("dt", "", name), make("dd", "", type, ...makeParagraphs(member.description)));
  }
  return list;
}

/** Give a schema's own example, or make one up. */
function exampleOf(schema, depth = 0) {
  const { example, examples, ...rest } = resolved(schema);
  if (example !== undefined) return example;
  if (Array.isArray(examples) && examples.length) return examples[0];
  if ("default" in rest) return rest.default;
  if ("const" in rest) return rest.const;
  if (rest.enum) return rest.enum[0];
  if (depth > DEPTH) return null;
  const choices = rest.anyOf ?? rest.oneOf;
  if (choices) return exampleOf(choices[0], depth + 1);
  if (rest.type === "array") return [exampleOf(rest.items, depth + 1)];
  if (rest.properties) {
    const required = Object.entries(rest.properties).filter(([name]) => rest.required?.includes(name));
    return Object.fromEntries(required.map(([name, member]) => [name, exampleOf(member, depth + 1)]));
  }
  return { string: "text", integer: rest.minimum ?? 1, number: 0.5, boolean: false, object: {} }[[rest.type].flat()[0]] ?? null;
}

/** List a body's examples by their names. */
function examplesOf(media) {
  if (media.examples) return Object.entries(media.examples).map(([name, { summary, value }]) => [summary ?? name, value]);
  return [["Example", media.example ?? exampleOf(media.schema)]];
}

// ---- Operations

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Write the line for curl that sends an example. Parameters in the path have their own example, or their names. */
function curlOf({ method, path, operation, needsKey }, body) {
  const values = (operation.parameters ?? []).map(({ name, example, schema }) => [name, example ?? (schema?.enum?.[0] ?? schema?.default)]);
  const filled = path.replace(/\{(\w+)\}/g, (_, name) => new Map(values).get(name) ?? name);
  const url = new URL(`.${filled}`, new URL("./", location.href)).href;
  const parts = [`curl ${/^[\w:/.[\]-]+$/.test(url) ? url : quoted(url)}`];
  if (needsKey) parts.push('-H "authorization: Bearer $KEY"');
  if (body !== undefined) parts.push("-H 'content-type: application/json'", `-d ${quoted(JSON.stringify(body))}`);
  else if (method !== "get") parts[0] += ` -X ${method.toUpperCase()}`;
  return parts.join(" \\\n  ");
}

function makeParameters(parameters = []) {
  if (!parameters.length) return [];
  const list = make("dl", "members");
  for (const parameter of parameters) {
    const type = make("p", "", ...describeType(parameter.schema ?? {}), make("span", "quiet", `, in the ${parameter.in}`));
    list.append(make("dt", "", parameter.name), make("dd", "", type, ...makeParagraphs(parameter.description)));
  }
  return [make("h4", "", "Parameters"), list];
}

function makeRequest(found) {
  const media = resolved(found.operation.requestBody).content?.["application/json"];
  if (!media) return [make("h4", "", "With curl"), makePre(curlOf(found))];
  const shown = [make("h4", "", "Request"), makeSchema(resolved(media.schema))];
  for (const [name, value] of examplesOf(media)) {
    shown.push(make("h4", "", name), makePre(JSON.stringify(value, null, 2)));
    shown.push(make("h4", "", "With curl"), makePre(curlOf(found, value)));
  }
  return shown;
}

function makeAnswers(responses = {}) {
  const list = make("dl", "members");
  for (const [status, part] of Object.entries(responses)) {
    const response = resolved(part);
    const said = make("dd", "", ...makeParagraphs(response.description));
    for (const [kind, media] of Object.entries(response.content ?? {})) {
      said.append(make("p", "", `${kind}: `, ...describeType(media.schema ?? {})));
    }
    list.append(make("dt", "", status), said);
  }
  return list.childElementCount ? [make("h4", "", "Answers"), list] : [];
}

function makeOperation(found) {
  const { method, path, operation } = found;
  const title = make("h3", "", make("span", "method", method.toUpperCase()), ` ${path}`);
  const article = make("article", "", title);
  article.id = idOf(method, path);
  if (operation.summary) article.append(make("p", "", ...withCode(operation.summary)));
  if (operation.description !== operation.summary) article.append(...makeParagraphs(operation.description));
  article.append(...makeParameters(operation.parameters), ...makeRequest(found), ...makeAnswers(operation.responses));
  return article;
}

// ---- The page

/** List operations by their first tag; without tags, what is posted comes first. */
function operationsByTag() {
  const groups = new Map(api.tags?.map(({ name }) => [name, []]) ?? [["Scoring", []]]);
  for (const [path, item] of Object.entries(api.paths ?? {})) {
    for (const method of METHODS.filter((name) => item[name])) {
      const parameters = [...(item.parameters ?? []), ...(item[method].parameters ?? [])].map(resolved);
      const operation = { ...item[method], parameters };
      const tag = operation.tags?.[0] ?? (method === "get" ? "State" : "Scoring");
      const needsKey = (operation.security ?? api.security ?? []).some((way) => Object.keys(way).length > 0);
      groups.set(tag, [...(groups.get(tag) ?? []), { method, path, operation, needsKey }]);
    }
  }
  return groups;
}

/** Add a group of articles; the long list of schemas is folded in the contents. */
function addGroup(title, about, articles, isFolded = false) {
  const links = articles.map((article) => {
    const link = make("a", "", article.querySelector("h3").textContent);
    link.href = `#${article.id}`;
    return make("li", "", link);
  });
  const [heading, list] = [make("h2", "", title), make("ul", "", ...links)];
  find("contents").append(...(isFolded ? [make("details", "", make("summary", "", heading), list)] : [heading, list]));
  find("api").append(make("h2", "", title), ...makeParagraphs(about), ...articles);
}

function show() {
  find("version").textContent = `(OpenAPI ${api.openapi}, version ${api.info?.version})`;
  find("api").replaceChildren(...makeParagraphs(api.info?.description));
  for (const [tag, operations] of operationsByTag()) {
    if (operations.length) addGroup(tag, api.tags?.find(({ name }) => name === tag)?.description, operations.map(makeOperation));
  }
  const articles = Object.entries(api.components?.schemas ?? {}).map(([name, schema]) => {
    const article = make("article", "", make("h3", "", name), ...makeParagraphs(schema.description), makeSchema(schema));
    article.id = idOf("schema", name);
    return article;
  });
  if (articles.length) addGroup("Schemas", "", articles, true);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

async function begin() {
  let problem;
  try {
    const reply = await call("openapi.json");
    if (reply.ok) {
      api = reply.body;
      return show();
    }
    problem = explain(reply);
    if (reply.status === 401) problem.details = "Give the key on the page that ranks candidates, then come back to this one.";
  } catch (error) {
    problem = { title: "The server cannot be reached.", details: error.message };
  }
  const box = make("div", "problem", make("p", "title", problem.title), make("p", "text", problem.details));
  box.role = "alert";
  find("api").replaceChildren(box);
}

begin();
