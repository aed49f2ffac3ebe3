/** What is true now: the state, what runs, how far a load is, what went wrong and what helps. */

import { $, bytes, el, named, put, say, seconds, value } from "./dom.js";
import { fieldBox, fieldLabel, focusField } from "./form.js";
import { FIELDS } from "./fields.js";

const PHASES = { killing: "Stopping", downloading: "Downloading", spawning: "Starting", loading: "Loading" };
const QUIET = new Set(["superseded", "cancelled"]);
const RATE_OVER_MS = 4000;

let status = null;
let since = 0; // by this page's clock
let samples = [];
let errorShown = "";

/** @param {any} now a status */
export function show(now) {
  status = now;
  since = Date.now() - now.uptime_s * 1000;
  const { state, loaded, loading, last_error: error } = now;
  const isFailed = state === "Idle" && error && !QUIET.has(error.category);
  say($("state"), state);
  $("dot").className = `dot ${isFailed ? "failed" : state.toLowerCase()}`;
  const about = loaded ?? loading; // what runs, also while the next one is fetched
  document.title = about ? `${state} · ${named(about)}` : `${state} · llama-orchestrator`;
  say($("model"), about ? named(about, true) : "Nothing is loaded.");
  $("cancel").hidden = !loading;
  $("unload").hidden = !loaded && !loading;
  put($("facts"), ...facts(loaded));
  put($("notes"), ...notes(now).map((text) => el("li", {}, text)));
  if (!loading) progress({ phase: null });
  else if ($("progress").hidden) progress({ phase: loading.phase, bytes_done: null });
  showError(error && { ...error, story: now.story });
  tick();
}

/** Once a second. */
export const tick = () => status && say($("since"), `for ${seconds(Math.max(1, Math.floor((Date.now() - since) / 1000)))}`);

function facts(loaded) {
  if (!loaded) return [];
  const asked = loaded.requested_context_length || "Auto";
  const rows = [
    ["Context", `${loaded.context_length?.toLocaleString("en") ?? "?"} tokens (asked: ${asked})`],
    ["KV cache", value(loaded.cache_type_kv)],
    ["Speculative", { off: "Off", default: "On" }[loaded.speculative_type] ?? loaded.speculative_type],
    ...FIELDS.filter(({ name, control, isShown }) => isShown && control !== "check" && name in loaded).map(({ name, label }) => [label, value(loaded[name])]),
    ["Extra arguments", value(loaded.llama_extra_args)],
    ["Vision", loaded.is_vision && "yes"],
    ["Revision", loaded.revision?.slice(0, 12)],
    ["Clients", `${location.origin}/v1`],
    ["Server", loaded.base_url],
    ["Process", `pid ${loaded.pid}`],
    ["Loaded in", `${seconds(loaded.timings_s.total)} (generation ${loaded.generation})`],
  ];
  return rows.filter(([, text]) => text).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)));
}

function notes(now) {
  const { loaded, loading, recovery, last_exit: exit, last_error: error } = now;
  const told = [];
  if (loading && loaded) told.push(`${named(loading)} is being fetched; ${named(loaded)} keeps serving until then.`);
  if (loading?.queued) told.push(`${loading.queued} more in the queue.`);
  for (const one of now.prefetching) {
    const all = one.bytes_total ? ` of ${bytes(one.bytes_total)}` : "";
    told.push(`Prefetching ${named(one)}: ${bytes(one.bytes_done)}${all}.`);
  }
  if (recovery) {
    const left = seconds(recovery.left_s);
    const what = { waiting: `starts again in ${left}`, trying: "is starting again", cooling_down: `cools down for ${left}` };
    told.push(`${recovery.model_path} ended by itself (${recovery.failures} in a row) and ${what[recovery.phase]}.`);
  }
  if (now.occupied_by) told.push(`Process ${now.occupied_by} would not die and keeps the slot occupied.`);
  if (!loaded && !loading && !recovery && exit && !error) told.push(`The last server (pid ${exit.pid}) ended with exit code ${exit.returncode ?? "?"}.`);
  if (error && QUIET.has(error.category)) told.push(error.detail);
  if (loaded?.note) told.push(loaded.note);
  return told;
}

/** @param {any} step of a load: phase, bytes_done, bytes_total, fraction */
export function progress(step) {
  const isBusy = Boolean(step.phase && step.phase !== "ready");
  $("progress").hidden = !isBusy;
  if (!isBusy) return void (samples = []);
  const bar = $("bar");
  if (step.fraction === null || step.fraction === undefined) bar.removeAttribute("value");
  else bar.value = step.fraction;
  const parts = [PHASES[step.phase] ?? step.phase];
  if (step.bytes_done !== null && step.bytes_done !== undefined) {
    if (samples[0]?.phase !== step.phase || samples.at(-1).done > step.bytes_done) samples = [];
    samples.push({ phase: step.phase, at: Date.now(), done: step.bytes_done });
    while (samples.at(-1).at - samples[0].at > RATE_OVER_MS) samples.shift();
    parts.push(bytes(step.bytes_done) + (step.bytes_total ? ` of ${bytes(step.bytes_total)}` : ""));
    const rate = ((samples.at(-1).done - samples[0].done) / (samples.at(-1).at - samples[0].at)) * 1000;
    if (rate > 0) parts.push(`${bytes(rate)}/s`);
    if (rate > 0 && step.bytes_total) parts.push(`${seconds(Math.ceil((step.bytes_total - step.bytes_done) / rate))} left`);
  }
  say($("progress-text"), parts.join(" · "));
}

/** An error stays until something became Healthy; a load that gave way is no error. */
function showError(error) {
  const isShown = error && !QUIET.has(error.category);
  const key = isShown ? JSON.stringify([error.generation, error.category, error.detail]) : "";
  if (key === errorShown) return;
  errorShown = key;
  put($("error"), isShown ? problem(error) : null);
}

/** A problem document, readable: what happened, what helps, and the evidence. */
export function problem(error) {
  const marks = [error.category, error.reason, error.generation && `generation ${error.generation}`];
  const back = error.restored;
  const backText = back && `${back.model_path} ${back.status === "loaded" ? "runs again" : `could not be brought back: ${back.problem?.detail}`}.`;
  return el(
    "div",
    { class: "problem" },
    el("h3", {}, error.title ?? "Failed"),
    el("p", {}, error.detail),
    backText && el("p", {}, backText),
    el("p", { class: "soft" }, marks.filter(Boolean).join(" · ")),
    fieldBox(error.field) && el("button", { type: "button", onclick: () => focusField(error.field) }, `Go to “${fieldLabel(error.field)}”`),
    fold("Last lines of its output", error.log_tail, true),
    fold("Story", error.story, false),
  );
}

function fold(title, lines, open) {
  if (!lines?.length) return null;
  return el("details", { open }, el("summary", {}, title), el("pre", { tabIndex: 0, "aria-label": title }, lines.join("\n")));
}
