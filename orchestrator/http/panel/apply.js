/** Apply: what it would do and why, before the click; and the outcome of each load after it. */

import { get, post } from "./api.js";
import { $, bytes, el, named, put, say, seconds, value } from "./dom.js";
import { chosenVariant, focusField, read, showFieldError } from "./form.js";

const PLAN_AFTER_MS = 300;

let timer = 0;
let planning = new AbortController();
let sending = Promise.resolve(); // one at a time: the last click must arrive last
const mine = new Set(); // generations submitted here, without an outcome yet
let status = null;

/** Show what Apply would do, once the user has stopped typing. */
export function planSoon() {
  clearTimeout(timer);
  timer = setTimeout(plan, PLAN_AFTER_MS);
}

async function plan() {
  planning.abort();
  planning = new AbortController();
  try {
    const { hf_token: _, ...body } = read();
    if (!body.model_path) return showPlan(el("p", {}, "Enter a model to load."));
    const found = await post("plan", body, planning.signal);
    showFieldError(null);
    const note = found.note ? el("p", {}, `${found.note[0].toUpperCase()}${found.note.slice(1)}.`) : null;
    showPlan(...sentences(found, body), note, found.argv);
  } catch (error) {
    const { name, message, problem } = /** @type {any} */ (error);
    if (name === "AbortError") return;
    const failure = problem ?? { field: "llama_extra_args", detail: message };
    showFieldError(failure);
    if ($("plan").textContent !== failure.detail) showPlan(el("p", { class: "wrong" }, failure.detail)); // an alert stays
  }
}

function sentences(found, body) {
  const [loading, variant] = [status?.loading, chosenVariant()];
  const needs = variant && !variant.is_cached ? `, after a download of ${bytes(variant.size_bytes)}` : "";
  const over = loading && body.on_busy === "supersede" ? el("p", {}, `It supersedes generation ${loading.generation}.`) : null;
  if (found.action === "none") return [el("p", {}, loading ? "Nothing to do: this load is in flight." : "Nothing to do: this model is loaded with these settings.")];
  if (found.action === "load") return [el("p", {}, el("strong", {}, "Load"), ` ${named(body)}${needs}.`), over];
  const reasons = found.reload_reasons.map((one) =>
    el("li", {}, el("code", {}, one.field), ` ${value(one.running)} → ${value(one.requested)}`),
  );
  return [el("p", {}, el("strong", {}, "Reload"), needs, reasons.length ? ":" : "."), el("ul", {}, ...reasons), over];
}

function showPlan(...parts) {
  const argv = Array.isArray(parts.at(-1)) ? parts.pop() : null;
  put($("plan"), ...parts);
  $("argv-box").hidden = !argv;
  say($("argv"), argv ? argv.join(" ") : "");
}

/** Submit the form. Every click is a load of its own; resolves when it is accepted. */
export async function apply() {
  let body;
  try {
    body = read();
  } catch (error) {
    return refused({ field: "llama_extra_args", detail: /** @type {any} */ (error).message });
  }
  body.load_request_id = `panel-${[...crypto.getRandomValues(new Uint32Array(4))].map((n) => n.toString(36)).join("")}`;
  sending = sending.then(() => submit(body));
  await sending;
}

async function submit(body) {
  try {
    const { generation } = await post("load?wait=false", body);
    showFieldError(null);
    if (status?.loaded?.generation === generation) return say($("sent"), `Generation ${generation} is already loaded.`);
    mine.add(generation);
    say($("sent"), `Submitted as generation ${generation}.`);
    settle((await get("loads?limit=50")).loads);
  } catch (error) {
    refused(/** @type {any} */ (error).problem);
  }
}

function refused(problem) {
  say($("sent"), "");
  showFieldError(problem);
  showPlan(el("p", { class: "wrong", role: "alert" }, problem.detail));
  if (problem.field) focusField(problem.field);
}

/** Show the outcome of loads that were submitted here. */
export function settle(loads) {
  for (const { generation, outcome } of [...loads].reverse()) {
    if (!outcome || !mine.delete(generation)) continue;
    say($("sent"), outcomeText(generation, outcome));
  }
}

function outcomeText(generation, outcome) {
  if (outcome.category === "superseded") return `Generation ${generation} was superseded by a newer load.`;
  if (outcome.category === "cancelled") return `Generation ${generation} was cancelled.`;
  if (outcome.category) return `Generation ${generation} failed.`;
  return `Generation ${generation} is Healthy (loaded in ${seconds(outcome.timings_s.total)}).`;
}

/** Plan again when the status has changed. */
export function onStatus(now) {
  const key = (of) => JSON.stringify([of?.state, of?.loaded?.generation, of?.loading?.generation]);
  const isNew = key(now) !== key(status);
  status = now;
  if (isNew) planSoon();
}
