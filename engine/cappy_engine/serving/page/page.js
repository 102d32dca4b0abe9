// Ask the server to rank candidates, and show its answer. Texts reach the document as text, never as HTML.

import { find, make } from "./elements.js";
import { call, explain, keepKey } from "./server.js";

const EXAMPLE = {
  instruction:
    "What label best describes this news article?\n" +
    "Shares of the airline fell after it warned that higher fuel costs would cut its profit this year.",
  candidates: "World\nSports\nBusiness\nScience and technology",
};
const HINTS = {
  lines: "One on each line. Empty lines are left out.",
  rules: "Each may have several lines. A line of --- ends it.",
};
const PATIENCE_MS = 300; // an answer that comes sooner needs no word that it is awaited

let limits = {};
let running = null; // what aborts the request that is on its way
let isWaitingForKey = false; // a ranking was refused for want of a key: it is asked again with one

/** Make a paragraph of a text that someone wrote: its own direction, its own line breaks. */
function makeText(text) {
  const element = make("p", "text", text);
  element.dir = "auto";
  return element;
}

// ---- Candidates

/** List the candidates as they are in the text, with the places where they begin and end. */
function readCandidates(text, separator) {
  const parts = [];
  let start = 0;
  for (const line of text.split("\n")) {
    const end = start + line.length;
    const last = parts.at(-1);
    if (separator === "lines") parts.push({ start, end });
    else if (line.trim() === "---") parts.push(null);
    else if (last) last.end = end;
    else parts.push({ start, end });
    start = end + 1;
  }
  return parts
    .filter((part) => part !== null)
    .map((part) => (separator === "rules" ? withoutOuterBreaks(text, part) : part))
    .map((part) => ({ ...part, text: text.slice(part.start, part.end) }))
    .filter((part) => part.text.trim() !== "");
}

/** Leave out the empty lines before and after a candidate; within it, all is kept. */
function withoutOuterBreaks(text, { start, end }) {
  const inside = text.slice(start, end);
  const before = inside.match(/^(?:[^\S\n]*\n)*/)[0].length;
  const after = inside.slice(before).match(/(?:\n[^\S\n]*)*$/)[0].length;
  return { start: start + before, end: end - after };
}

function chosen(name) {
  return find("ask").elements[name].value;
}

/** Say how many candidates there are, and how they are told apart. */
function countCandidates() {
  find("candidates-hint").textContent = HINTS[chosen("separator")];
  const count = readCandidates(find("candidates").value, chosen("separator")).length;
  const isTooMany = limits.max_pairs && count > limits.max_pairs;
  find("count").textContent = isTooMany
    ? `${plural(count, "candidate")}, but a request may have only ${limits.max_pairs}`
    : count ? plural(count, "candidate") : "";
  find("count").classList.toggle("is-too-many", Boolean(isTooMany));
}

// ---- Numbers and words

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** Write a number with a real minus sign, which is read aloud as one. */
function written(value, digits) {
  return value.toFixed(digits).replace("-", "\u2212");
}

function writtenScore(score) {
  return written(score, Math.abs(score) >= 1000 ? 1 : Math.abs(score) >= 100 ? 2 : 4);
}

function writtenEnd(value) {
  return String(Number(value.toFixed(2))).replace("-", "\u2212");
}

function writtenMs(value) {
  const ms = Number(value);
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

// ---- The server

async function askWhatRuns() {
  const line = find("model");
  let reply;
  try {
    reply = await call("info");
  } catch {
    line.textContent = "The server cannot be reached.";
    return;
  }
  if (reply.status === 401) {
    line.textContent = explain(reply).title;
    askForKey();
    return;
  }
  if (!reply.ok) {
    line.textContent = explain(reply).title;
    return;
  }
  const info = reply.body;
  limits = info.limits ?? {};
  line.textContent = `${info.model}, ${info.precision} on ${info.device}. It reads ${info.max_length} tokens of a pair.`;
  find("exact-choice").hidden = !info.exact_winner;
  countCandidates();
}

function askForKey() {
  find("key-form").hidden = false;
  find("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  const key = find("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    showProblem({ title: "This is not an API key.", details: "A key has letters, digits and signs of ASCII, and no space." });
    return;
  }
  keepKey(key);
  find("key").value = "";
  find("key-form").hidden = true;
  clearProblem();
  if (isWaitingForKey) await rank();
  else find("instruction").focus();
  await askWhatRuns();
}

// ---- Rank

/** Make the body of the request, or show what is missing and give null. */
function readRequest() {
  const instruction = find("instruction").value;
  const candidates = readCandidates(find("candidates").value, chosen("separator"));
  const topN = find("top_n");
  for (const [isWrong, id, title] of [
    [instruction.trim() === "", "instruction", "Type an instruction."],
    [candidates.length === 0, "candidates", "Type at least one candidate."],
    [!topN.validity.valid, "top_n", "The number of candidates to show must be 1 or more, or empty."],
  ]) {
    find(id).toggleAttribute("aria-invalid", false);
    if (!isWrong) continue;
    find(id).setAttribute("aria-invalid", "true");
    showProblem({ title });
    find(id).closest("details")?.setAttribute("open", "");
    find(id).focus();
    return null;
  }
  return {
    places: candidates,
    body: {
      instruction,
      candidates: candidates.map((candidate) => candidate.text),
      top_n: topN.value === "" ? null : Number(topN.value),
      exact_winner: !find("exact-choice").hidden && find("exact_winner").checked,
      too_long: chosen("too_long"),
    },
  };
}

/** Ask for a ranking and show it. A request that is still on its way is given up: the server then drops its work. */
async function rank() {
  running?.abort();
  const request = readRequest();
  if (request === null) return;
  const { signal } = (running = new AbortController());
  const answer = find("answer");
  answer.setAttribute("aria-busy", "true");
  const patience = setTimeout(() => {
    find("summary").textContent = `Ranking ${plural(request.places.length, "candidate")} …`;
  }, PATIENCE_MS);
  try {
    const reply = await call("v1/rank", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request.body),
      signal,
    });
    showReply(reply, request);
  } catch (error) {
    if (signal.aborted) return;
    showProblem({ title: "The server cannot be reached.", details: `${error.message}. Is it still running?` });
  } finally {
    clearTimeout(patience);
    if (running?.signal === signal) {
      answer.removeAttribute("aria-busy");
      running = null;
    }
  }
}

function showReply(reply, request) {
  isWaitingForKey = reply.status === 401;
  if (reply.ok) {
    clearProblem();
    showRanking(reply, request);
  } else {
    showProblem(explain(reply), request.places);
  }
  if (isWaitingForKey) askForKey();
  else scrollToAnswer();
}

// ---- Show

function clearProblem() {
  find("problem").hidden = true;
  find("problem").replaceChildren();
}

/** Show what went wrong; an older ranking goes, so that nobody takes it for the answer. */
function showProblem({ title, details = "", pair = null }, places = []) {
  const problem = find("problem");
  problem.replaceChildren(make("p", "title", title));
  if (details) problem.append(makeText(details));
  if (places[pair]) problem.append(makeJump(places[pair], pair));
  problem.hidden = false;
  find("ranking").replaceChildren();
  find("scale").hidden = find("facts").hidden = true;
  find("summary").textContent = "";
}

function makeJump({ start, end }, pair) {
  const button = make("button", "plain", `Go to candidate ${pair + 1}`);
  button.type = "button";
  button.addEventListener("click", () => {
    find("candidates").focus();
    find("candidates").setSelectionRange(start, end);
  });
  return button;
}

function showRanking(reply, request) {
  const { results, model, precision, device, tokens, truncated } = reply.body;
  const count = request.places.length;
  const shown = results.length < count ? `, the best ${results.length} are shown` : "";
  const best = results.length ? ` The best is candidate ${results[0].index + 1} with ${writtenScore(results[0].score)}.` : "";
  const lost = truncated ? ` ${truncated} of them ${truncated === 1 ? "was" : "were"} truncated.` : "";
  find("summary").textContent = `${plural(count, "candidate")} ranked${shown}.${best}${lost}`;
  const scale = scaleOf(results.map((result) => result.score));
  showScale(scale);
  find("ranking").replaceChildren(...results.map((result) => makeResult(result, scale)));
  addShowAll();
  showFacts([
    ["Model", `${model}, ${precision} on ${device}`],
    ["Tokens", `${tokens} in ${plural(count, "pair")}`],
    ["Server", serverTime(reply.headers)],
    ["Round trip", writtenMs(reply.ms)],
  ]);
}

/** Choose the ends of the bars' scale: 0 and 1, and further where a score is outside them. */
function scaleOf(scores) {
  const low = Math.min(0, ...scores);
  const high = Math.max(1, ...scores);
  return { low, high, part: (value) => (value - low) / (high - low) };
}

function showScale({ low, high, part }) {
  const ends = low < 0 && part(0) > 0.08 && part(0) < 0.92 ? [low, 0, high] : [low, high];
  find("scale").replaceChildren(
    ...ends.map((value) => {
      const mark = make("span", "", writtenEnd(value));
      mark.style.setProperty("--at", part(value));
      return mark;
    }),
  );
  find("scale").hidden = false;
}

function makeResult(result, scale) {
  const notes = [`candidate ${result.index + 1}`, plural(result.tokens, "token")];
  if (result.is_exact) notes.push("scored again in fp32");
  const line = make("p", "notes", notes.join(" · "));
  if (result.is_truncated) {
    line.append(" · ", make("strong", "", "truncated: it has too many tokens, the model read only a part of it"));
  }
  const score = make("p", "score", make("span", "for-ears", "Score "), writtenScore(result.score));
  return make("li", "", makeText(result.response), score, makeBar(result.score, scale), line);
}

/** Draw a score as a bar that begins at 0. The score stands beside it as text. */
function makeBar(score, { part }) {
  const bar = make("div", "bar", make("span", ""));
  bar.ariaHidden = "true";
  bar.style.setProperty("--zero", part(0));
  bar.style.setProperty("--from", part(Math.min(0, score)));
  bar.style.setProperty("--to", part(Math.max(0, score)));
  if (score < 0) bar.classList.add("is-negative");
  return bar;
}

/** Give a button to each text that is cut off by the style sheet. */
function addShowAll() {
  const texts = [...find("ranking").querySelectorAll(".text")];
  const long = texts.filter((text) => text.scrollHeight > text.clientHeight + 1); // all are measured before any change
  for (const text of long) {
    const button = make("button", "plain show-all", "Show all");
    button.type = "button";
    button.ariaExpanded = "false";
    button.addEventListener("click", () => {
      const isOpen = text.classList.toggle("is-open");
      button.ariaExpanded = String(isOpen);
      button.textContent = isOpen ? "Show less" : "Show all";
    });
    text.after(button);
  }
}

function serverTime(headers) {
  const stages = ["tokenize", "queue", "score"]
    .map((stage) => [stage, headers.get(`x-cappy-${stage}-ms`)])
    .filter(([, ms]) => ms !== null)
    .map(([stage, ms]) => `${stage} ${writtenMs(ms)}`);
  const total = headers.get("x-cappy-total-ms");
  if (total === null) return stages.join(", ") || "not told";
  return stages.length ? `${writtenMs(total)} (${stages.join(", ")})` : writtenMs(total);
}

function showFacts(facts) {
  find("facts").replaceChildren(...facts.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
  find("facts").hidden = false;
}

/** On a narrow screen the answer is below the form. */
function scrollToAnswer() {
  const { top } = find("answer").getBoundingClientRect();
  if (top >= 0 && top < window.innerHeight * 0.7) return;
  const isCalm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  find("answer").scrollIntoView({ behavior: isCalm ? "auto" : "smooth" });
}

// ---- Begin

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  rank();
});
find("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
    event.preventDefault();
    rank();
  }
});
find("ask").addEventListener("input", countCandidates);
find("key-form").addEventListener("submit", useKey);
find("example").addEventListener("click", () => {
  for (const [id, text] of Object.entries(EXAMPLE)) find(id).value = text;
  find("ask").elements.separator.value = "lines";
  countCandidates();
  rank();
});
if (/Mac|iPhone|iPad/.test(navigator.platform)) document.querySelector("kbd").textContent = "⌘ Enter";
countCandidates();
askWhatRuns();
