/** Apply: what it would do and why, before the click; and the outcome of each load after it. */

import { MODEL, get, post } from "./api.js";
import { $, bytes, el, mib, named, put, say, seconds, value } from "./dom.js";
import { chosenVariant, focusField, read as readForm, refill, showFieldError } from "./form.js";

const PLAN_AFTER_MS = 300;

let timer = 0;
let planning = new AbortController();
let sending = Promise.resolve(); // one at a time: the last click must arrive last
const mine = new Set(); // generations submitted here, without an outcome yet
let status = null;

/** The body of a load: of a model of a pool, everything is in the catalogue. */
const read = () => (MODEL === null ? readForm() : {});

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
    $("prefetch-only").hidden = true;
    if (MODEL === null && !body.model_path) return showPlan(el("p", {}, "Enter a model to load."));
    const found = await post("plan", body, planning.signal);
    showFieldError(null);
    const note = found.note ? el("p", {}, `${found.note[0].toUpperCase()}${found.note.slice(1)}.`) : null;
    $("prefetch-only").hidden = !status?.loaded || !needsDownload();
    showPlan(...sentences(found, body), note, found.argv);
  } catch (error) {
    const { name, message, problem } = /** @type {any} */ (error);
    if (name === "AbortError") return;
    const failure = problem ?? { field: "llama_extra_args", detail: message };
    showFieldError(failure);
    if ($("plan").textContent !== failure.detail) showPlan(el("p", { class: "wrong" }, failure.detail)); // an alert stays
  }
}

const needsDownload = () => MODEL === null && chosenVariant()?.is_cached === false;

function sentences(found, body) {
  const loading = status?.loading;
  const needs = needsDownload() ? `, after a download of ${bytes(chosenVariant().size_bytes)}` : "";
  const over = loading && body.on_busy === "supersede" ? el("p", {}, `It supersedes generation ${loading.generation}.`) : null;
  if (found.action === "none") return [el("p", {}, loading ? "Nothing to do: this load is in flight." : "Nothing to do: this model is loaded with these settings.")];
  const room = roomFor(found);
  if (found.action === "load") return [el("p", {}, el("strong", {}, "Load"), ` ${MODEL ?? named(body)}${needs}.`), over, room];
  const reasons = found.reload_reasons.map((one) =>
    el("li", {}, el("code", {}, one.field), ` ${value(one.running)} → ${value(one.requested)}`),
  );
  return [el("p", {}, el("strong", {}, "Reload"), needs, reasons.length ? ":" : "."), el("ul", {}, ...reasons), over, room];
}

/** What it would take and find, and what goes for it. */
function roomFor({ memory, free, fits, evict }) {
  if (!memory) return null;
  const has = free ? ` of ${Object.entries(free).map(([device, n]) => `${mib(n)} free on ${device}`).join(", ")}` : "";
  const stops = evict?.length ? ` It stops ${evict.join(", ")}.` : "";
  const isTooMuch = fits === false;
  const verdict = isTooMuch ? (evict ? "It does not fit beside the pinned models or into the budget: " : "It does not fit: ") : "";
  return el("p", { class: isTooMuch ? "wrong" : "soft" }, `${verdict}${verdict ? "it" : "It"} takes ${mib(memory.mib)}${memory.source === "estimate" ? " (estimate)" : ""}${has}.${stops}`);
}

/** Load once more what was asked for before. A person need not wait for the end of a cool-down. */
export async function again({ request }) {
  if (MODEL === null) refill(request, { force: true });
  await apply(status?.recovery ? { force_reload: true } : {});
}

/** Download what the form names, while the running model keeps serving. */
export async function prefetch() {
  const { model_path, gguf_variant, revision, hf_token } = read();
  say($("sent"), `Downloading ${named({ model_path, gguf_variant })} …`);
  try {
    await post("prefetch", { model_path, gguf_variant, revision, hf_token });
    say($("sent"), `${named({ model_path, gguf_variant })} is on disk.`);
    planSoon();
  } catch (error) {
    refused(/** @type {any} */ (error).problem);
  }
}

function showPlan(...parts) {
  const argv = Array.isArray(parts.at(-1)) ? parts.pop() : null;
  put($("plan"), ...parts);
  $("argv-box").hidden = !argv;
  say($("argv"), argv ? argv.join(" ") : "");
}

/** Submit the form. Every click is a load of its own; resolves when it is accepted. */
export async function apply(more = {}) {
  let body;
  try {
    body = { ...read(), ...more };
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
    if (MODEL !== null) follow(generation);
  } catch (error) {
    refused(/** @type {any} */ (error).problem);
  }
}

/** A load of a pool may be refused before its server starts: then the last loads do not have it. */
async function follow(generation) {
  while (mine.has(generation)) {
    const found = await get(`loads/${generation}?wait_s=25`).catch(() => ({ outcome: { category: "unknown" } }));
    if (!found.outcome) continue;
    settle([found]);
    if (found.outcome.detail && found.outcome.category !== "cancelled") showPlan(el("p", { class: "wrong" }, found.outcome.detail));
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
