/** The last lines of the servers' output: followed, coloured by level, filtered, copied, kept. */

import { $, copy, el, say } from "./dom.js";
import { follow } from "./stream.js";

const MOST_LINES = 2000;
const LEVEL = /^[\d.]+ ([DIWE]) /;
const WORDS = [["E", /\b(error|failed|fatal|exception|abort)/i], ["W", /\bwarn/i]];

let stream = null;
let isNew = true;
let rest = "";
let generation = 0; // whose divider is the last
let cause = "";

/** Begin or stop following, after the switch was changed. */
export function toggle() {
  stream?.stop();
  stream = null;
  if (!$("follow").checked) return;
  stream = follow("logs?follow=true&lines=500", {
    mayBeSilent: true,
    onOpen: () => (isNew = true), // the last lines are sent again
    onText: add,
    onLost: () => {},
  });
}

export const retry = () => stream?.retry();

const divider = () => el("li", { class: "divider" }, `generation ${generation}`);

/** What follows is of the server of another load; of a start before this page, so is what is there. */
export function divide(next, { isBefore }) {
  if (next === generation) return;
  generation = next;
  if (!isBefore) return append([divider()]);
  if ($("log").firstChild?.className === "divider") $("log").firstChild.remove();
  $("log").prepend(divider());
}

/** Mark the line that says why the last start has failed; "" for none. */
export function explain(error) {
  cause = error?.category === "server_start_failed" || error?.category === "server_exited" ? error.detail : "";
  mark();
}

function add(text) {
  if (isNew) {
    $("log").replaceChildren();
    if (generation) $("log").append(divider());
    rest = "";
  }
  isNew = false;
  const lines = (rest + text).split("\n");
  rest = lines.pop() ?? "";
  append(lines.map(lineOf));
  if (cause) mark();
}

function lineOf(text) {
  const level = LEVEL.exec(text)?.[1] ?? WORDS.find(([, words]) => words.test(text))?.[0] ?? "";
  const line = el("li", { class: level }, text);
  line.hidden = !isWanted(text);
  return line;
}

function append(lines) {
  const log = $("log");
  const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  log.append(...lines);
  while (log.childElementCount > MOST_LINES) log.firstChild.remove();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/** The last line of which the error's sentence has the words, else the last error. */
function mark() {
  const lines = [...$("log").children];
  for (const old of $("log").querySelectorAll(".cause")) old.classList.remove("cause");
  if (!cause) return;
  const words = new Set(cause.match(/[\w-]{4,}/g));
  const score = (line) => (line.textContent.match(/[\w-]{4,}/g) ?? []).filter((word) => words.has(word)).length;
  const errors = lines.filter((line) => line.classList.contains("E"));
  const best = errors.reduce((found, line) => (found && score(found) > score(line) ? found : line), null);
  best?.classList.add("cause");
}

const isWanted = (text) => text.toLowerCase().includes($("filter").value.trim().toLowerCase());
const lines = () => [...$("log").children].filter((one) => !one.hidden).map((one) => (one.className === "divider" ? `---- ${one.textContent}` : one.textContent));

$("filter").addEventListener("input", () => {
  for (const line of $("log").children) line.hidden = !line.classList.contains("divider") && !isWanted(line.textContent);
  $("log").scrollTop = $("log").scrollHeight;
});
$("log-copy").addEventListener("click", async () => {
  await copy(lines().join("\n"));
  say($("announce"), "The output is copied.");
});
$("log-save").addEventListener("click", () => {
  const href = URL.createObjectURL(new Blob([`${lines().join("\n")}\n`], { type: "text/plain" }));
  el("a", { href, download: `llama-server-${generation || 0}.log` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
});
