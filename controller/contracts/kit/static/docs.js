"use strict";

// Renders an OpenAPI document. All text goes in as text nodes, never as markup.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function resolve(spec, schema) {
  while (schema && schema.$ref) schema = schema.$ref.slice(2).split("/").reduce((at, key) => at[key], spec);
  return schema || {};
}

function typeName(spec, schema) {
  schema = resolve(spec, schema);
  if (schema.anyOf) return schema.anyOf.map((item) => typeName(spec, item)).join(" or ");
  if (schema.enum) return schema.enum.map((item) => JSON.stringify(item)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return "list of " + typeName(spec, schema.items);
  return (schema.format || schema.type || "any") + bounds(schema);
}

function bounds(schema) {
  const parts = [];
  if ("maxLength" in schema) parts.push("at most " + schema.maxLength + " characters");
  if ("minimum" in schema) parts.push("from " + schema.minimum);
  if ("maximum" in schema) parts.push("to " + schema.maximum);
  return parts.length ? " (" + parts.join(", ") + ")" : "";
}

function fieldTable(spec, schema) {
  schema = resolve(spec, schema);
  if (schema.type === "array") schema = resolve(spec, schema.items);
  if (!schema.properties) return null;
  const rows = Object.entries(schema.properties).map(([name, field]) =>
    row(spec, name, field, (schema.required || []).includes(name)));
  return el("table", {}, ...rows);
}

function row(spec, name, schema, required) {
  return el("tr", {},
    el("th", {}, el("code", {}, name)),
    el("td", {}, typeName(spec, schema), required ? "" : el("span", { class: "quiet" }, " optional")),
    el("td", {}, schema.description || ""));
}

function quoted(text) {
  return "'" + text.replaceAll("'", "'\\''") + "'";
}

function curl(server, path, method, operation) {
  const body = operation.requestBody && operation.requestBody.content["application/json"];
  const parts = ["curl"];
  if (method !== "get") parts.push("-X " + method.toUpperCase());
  parts.push(quoted(location.origin + server + path));
  if (operation.security.length) parts.push('-H "Authorization: Bearer $TOKEN"');
  if (body) parts.push("-H 'Content-Type: application/json'", "-d " + quoted(JSON.stringify(body.example || {})));
  return parts.join(" \\\n  ");
}

function operationNode(spec, path, method, operation) {
  const article = el("article", { id: operation.operationId },
    el("h2", {}, el("span", { class: "method" }, method.toUpperCase()), " " + path),
    el("p", {}, operation.summary + ". ", operation.description || ""),
    el("p", { class: "quiet" }, operation.security.length ? "Needs a token." : "Needs no token."));
  if (operation.parameters.length) {
    article.append(el("h3", {}, "Parameters"), el("table", {}, ...operation.parameters.map((item) =>
      row(spec, item.name + " (" + item.in + ")", { description: item.description, ...item.schema }, item.required))));
  }
  if (operation.requestBody) {
    article.append(el("h3", {}, "Request body"),
      fieldTable(spec, operation.requestBody.content["application/json"].schema) || "");
  }
  article.append(el("h3", {}, "Example"), el("pre", {}, curl(spec.servers[0].url, path, method, operation)));
  const failures = [];
  for (const [status, response] of Object.entries(operation.responses)) {
    if (!status.startsWith("2")) {
      failures.push(el("tr", {}, el("th", {}, status), el("td", {}, response.description)));
      continue;
    }
    for (const [media, content] of Object.entries(response.content)) {
      article.append(el("h3", {}, "Answer " + status + ", " + media));
      const fields = content.schema && fieldTable(spec, content.schema);
      if (fields) article.append(fields);
      if (content.example) article.append(el("pre", {}, JSON.stringify(content.example, null, 2)));
    }
  }
  article.append(el("h3", {}, "Refusals"), el("table", {}, ...failures));
  return article;
}

function show(spec) {
  document.title = spec.info.title;
  document.getElementById("title").textContent = spec.info.title;
  const main = document.getElementById("main");
  const index = document.getElementById("operations");
  main.replaceChildren(el("p", {}, spec.info.description));
  const groups = new Map();
  for (const [path, operations] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      main.append(operationNode(spec, path, method, operation));
      const tag = operation.tags[0];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(el("a", { href: "#" + operation.operationId }, operation.summary));
    }
  }
  for (const [tag, links] of groups) index.append(el("h2", {}, tag), ...links);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

async function fetchJson(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(path + ": " + response.status);
  return response.json();
}

async function start() {
  const contracts = await fetchJson("/docs/assets/contracts.json");
  const asked = location.pathname.split("/")[2];
  const name = contracts.some((contract) => contract.name === asked) ? asked : contracts[0].name;
  document.getElementById("contracts").append(
    ...contracts.map((contract) => el("a", { href: "/docs/" + contract.name }, contract.title)),
    el("a", { href: "/" + name + "/openapi.json" }, "OpenAPI document"));
  show(await fetchJson("/" + name + "/openapi.json"));
}

start().catch((error) => {
  document.getElementById("main").textContent = "The description could not be loaded: " + error.message;
});
