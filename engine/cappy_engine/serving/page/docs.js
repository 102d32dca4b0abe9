// Show what openapi.json says: operations with examples and a line for curl, then schemas.

import { find, make } from "./elements.js";
import { call, explain } from "./server.js";

const METHODS = ["get", "post", "put", "delete", "head", "options", "patch"];
const DEPTH = 5; // how deep a made-up example goes

let schemas = {};

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
  return schema?.$ref?.split("/").at(-1).replaceAll("~1", "/").replaceAll("~0", "~");
}

function resolved(schema = {}) {
  return schema.$ref ? { ...schemas[nameOf(schema)] } : schema;
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
    if (key in schema) found.push(`${word} ${schema[key]} ${key.endsWith("Items") ? "items" : "characters"}`);
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
  const media = found.operation.requestBody?.content?.["application/json"];
  if (!media) return [make("h4", "", "With curl"), makePre(curlOf(found))];
  const shown = [make("h4", "", "Request"), makeSchema(nameOf(media.schema) ? resolved(media.schema) : media.schema ?? {})];
  const choices = resolved(media.schema).anyOf ?? resolved(media.schema).oneOf;
  if (choices) shown.splice(1, 1, make("p", "", ...describeType(resolved(media.schema))));
  for (const [name, value] of examplesOf(media)) {
    shown.push(make("h4", "", name), makePre(JSON.stringify(value, null, 2)));
    shown.push(make("h4", "", "With curl"), makePre(curlOf(found, value)));
  }
  return shown;
}

function makeAnswers(responses = {}) {
  const list = make("dl", "members");
  for (const [status, response] of Object.entries(responses)) {
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

/** List operations by their first tag, in the order of the document. */
function operationsByTag(api) {
  const groups = new Map();
  for (const [path, item] of Object.entries(api.paths ?? {})) {
    for (const method of METHODS.filter((name) => item[name])) {
      const operation = { ...item[method], parameters: [...(item.parameters ?? []), ...(item[method].parameters ?? [])] };
      const tag = operation.tags?.[0] ?? "Operations";
      const needsKey = (operation.security ?? api.security ?? []).some((way) => Object.keys(way).length > 0);
      groups.set(tag, [...(groups.get(tag) ?? []), { method, path, operation, needsKey }]);
    }
  }
  return groups;
}

function addGroup(title, about, articles) {
  const links = articles.map((article) => {
    const link = make("a", "", article.querySelector("h3").textContent);
    link.href = `#${article.id}`;
    return make("li", "", link);
  });
  find("contents").append(make("h2", "", title), make("ul", "", ...links));
  find("api").append(make("h2", "", title), ...makeParagraphs(about), ...articles);
}

function show(api) {
  schemas = api.components?.schemas ?? {};
  find("version").textContent = `(OpenAPI ${api.openapi}, version ${api.info?.version})`;
  find("api").replaceChildren(...makeParagraphs(api.info?.description));
  for (const [tag, operations] of operationsByTag(api)) {
    addGroup(tag, api.tags?.find(({ name }) => name === tag)?.description, operations.map(makeOperation));
  }
  const articles = Object.entries(schemas).map(([name, schema]) => {
    const article = make("article", "", make("h3", "", name), ...makeParagraphs(schema.description), makeSchema(schema));
    article.id = idOf("schema", name);
    return article;
  });
  if (articles.length) addGroup("Schemas", "", articles);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

async function begin() {
  let problem;
  try {
    const reply = await call("openapi.json");
    if (reply.ok) return show(reply.body);
    problem = explain(reply);
  } catch (error) {
    problem = { title: "The server cannot be reached.", details: error.message };
  }
  const box = make("div", "problem", make("p", "title", problem.title), make("p", "text", problem.details));
  box.role = "alert";
  find("api").replaceChildren(box);
}

begin();
