/** The status: the state, the running model, the progress of a load, and errors. */

import { MODEL } from "./api.js";
import { $, bytes, count, el, mib, named, put, say, seconds, value } from "./dom.js";
import { fieldBox, fieldLabel, focusField } from "./form.js";
import { FIELDS } from "./fields.js";
import { isQuiet, plainly } from "./words.js";

const PHASES = { killing: "Stopping", downloading: "Downloading", spawning: "Starting", loading: "Loading" };
const RATE_OVER_MS = 4000;

let status = null;
let since = 0; // by this page's clock
let samples = [];
let errorShown = "";

/** @param {any} now a status @param {any} newest the last load */
export function show(now, newest) {
  status = now;
  since = Date.now() - now.uptime_s * 1000;
  const { state, loaded, loading, last_error: error } = now;
  const isFailed = state === "Idle" && !isQuiet(error);
  say($("state"), state);
  say($("words"), plainly(now));
  $("dot").className = `dot ${isFailed ? "failed" : state.toLowerCase()}`;
  const about = loaded ?? loading; // the running model, even while the next one is downloaded
  document.title = about ? `${state} · ${MODEL ?? named(about)}` : `${state} · llama-orchestrator`;
  put($("model"), about ? wholeName(about) : MODEL === null ? "Nothing is loaded." : `${MODEL} is not loaded.`);
  $("address").hidden = !loaded;
  $("cancel").hidden = !loading;
  $("again").hidden = state !== "Idle" || Boolean(loading) || !newest?.outcome || !(error || now.last_exit);
  $("unload").hidden = !loaded; // of a load in flight there is Cancel
  $("cut").hidden = now.draining_left_s === null;
  put($("facts"), ...facts(loaded));
  put($("notes"), ...notes(now).map((text) => el("li", {}, text)));
  if (!loading) progress({ phase: null });
  else if ($("progress").hidden) progress({ phase: loading.phase, bytes_done: null });
  showError(error && { ...error, story: now.story });
  tick();
}

/** Once a second. */
export const tick = () => status && say($("since"), `for ${seconds(Math.max(1, Math.floor((Date.now() - since) / 1000)))}`);

/** The name of the file large, and its folder small. */
function wholeName(about) {
  const text = named(about, true);
  const at = text.startsWith("/") ? text.lastIndexOf("/", text.lastIndexOf(" · ") > 0 ? text.lastIndexOf(" · ") : text.length) + 1 : 0;
  return [el("span", { class: "folder" }, text.slice(0, at)), text.slice(at)];
}

function facts(loaded) {
  if (!loaded) return [];
  const requested = loaded.requested_context_length || "Auto";
  const rows = [
    ["Context", `${loaded.context_length?.toLocaleString("en") ?? "?"} tokens (requested: ${requested})`],
    ["KV cache", value(loaded.cache_type_kv)],
    ["Memory", loaded.memory && memory(loaded.memory)],
    ["Speculative", { off: "Off", default: "On" }[loaded.speculative_type] ?? loaded.speculative_type],
    ...FIELDS.filter(({ name, control, isShown }) => isShown && control !== "check" && name in loaded).map(({ name, label }) => [label, value(loaded[name])]),
    ["Extra arguments", value(loaded.llama_extra_args)],
    ["Vision", loaded.is_vision && "yes"],
    ["Revision", loaded.revision?.slice(0, 12)],
    ["Server", loaded.base_url],
    ["Process", `pid ${loaded.pid}`],
    [loaded.adopted ? "Adopted in" : "Loaded in", `${seconds(loaded.timings_s.total)} (generation ${loaded.generation})`],
  ];
  return rows.filter(([, text]) => text).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)));
}

/** Such as `1.2 GiB (Host 0.2 GiB, CUDA0 1.0 GiB)`. */
function memory({ mib: whole, source, devices, fitted }) {
  const parts = Object.entries(devices).map(([device, n]) => `${device} ${mib(n)}`);
  const about = [source === "estimate" && "estimate", fitted && "context reduced to fit", parts.length > 1 && parts.join(", ")];
  const shown = about.filter(Boolean).join("; ");
  return mib(whole) + (shown && ` (${shown})`);
}

function notes(now) {
  const { loaded, loading, recovery, last_exit: exit, last_error: error } = now;
  const texts = [];
  if (loading && loaded) texts.push(`${named(loading)} is downloading; ${named(loaded)} keeps serving until then.`);
  if (loading?.queued) texts.push(`${loading.queued} more queued.`);
  for (const one of now.prefetching) {
    const all = one.bytes_total ? ` of ${bytes(one.bytes_total)}` : "";
    texts.push(`Prefetching ${named(one)}: ${bytes(one.bytes_done)}${all}.`);
  }
  if (recovery) {
    const left = seconds(recovery.left_s);
    const what = { waiting: `restarts in ${left}`, trying: "is restarting", cooling_down: `cools down for ${left}` };
    texts.push(`${recovery.model_path} exited unexpectedly (${recovery.failures} in a row) and ${what[recovery.phase]}.`);
  }
  if (now.draining_left_s !== null) texts.push(`Waits for ${count(now.leases, "request")} of this server, ${seconds(now.draining_left_s)} at most.`);
  if (now.occupied_by) texts.push(`Process ${now.occupied_by} could not be stopped and occupies the slot.`);
  if (!loaded && !loading && !recovery && exit && !error) texts.push(`The last server (pid ${exit.pid}) ${exit.reason === "hung" ? "hung" : `exited with code ${exit.returncode ?? "?"}`}.`);
  if (error && isQuiet(error)) texts.push(error.detail);
  if (loaded?.note) texts.push(loaded.note);
  return texts;
}

/** @param {any} step of a load: phase, bytes_done, bytes_total, fraction */
export function progress(step) {
  const isBusy = Boolean(step.phase && step.phase !== "ready");
  $("progress").hidden = !isBusy;
  if (!isBusy) return void (samples = []);
  const bar = $("bar");
  const isKnown = step.fraction !== null && step.fraction !== undefined;
  if (!isKnown) bar.removeAttribute("value");
  else bar.value = step.fraction;
  const parts = [PHASES[step.phase] ?? step.phase];
  if (step.bytes_done !== null && step.bytes_done !== undefined) {
    if (samples[0]?.phase !== step.phase || samples.at(-1).done > step.bytes_done) samples = [];
    samples.push({ phase: step.phase, at: Date.now(), done: step.bytes_done });
    while (samples.at(-1).at - samples[0].at > RATE_OVER_MS) samples.shift();
    parts.push(bytes(step.bytes_done) + (step.bytes_total ? ` of ${bytes(step.bytes_total)}` : ""));
    const rate = ((samples.at(-1).done - samples[0].done) / (samples.at(-1).at - samples[0].at)) * 1000;
    if (rate > 0) parts.push(`${bytes(rate)}/s`);
    if (rate > 0 && isKnown) parts.push(`${seconds(Math.ceil((step.bytes_total - step.bytes_done) / rate))} left`);
  }
  say($("progress-text"), parts.join(" · "));
}

/** An error is shown until a model is Healthy; a superseded load is not an error. */
function showError(error) {
  const isShown = error && !isQuiet(error);
  const key = isShown ? JSON.stringify([error.generation, error.category, error.detail]) : "";
  if (key === errorShown) return;
  errorShown = key;
  put($("error"), isShown ? problem(error) : null);
}

/** A problem document: what happened, what to do, and the evidence. */
export function problem(error) {
  const marks = [error.category, error.reason, error.generation && `generation ${error.generation}`];
  const back = error.restored;
  const backText = back && `${back.model_path} ${back.status === "loaded" ? "is loaded again" : `could not be restored: ${back.problem?.detail}`}.`;
  return el(
    "div",
    { class: "problem" },
    el("h3", {}, error.title ?? "Failed"),
    el("p", {}, error.detail),
    backText && el("p", {}, backText),
    el("p", { class: "soft" }, marks.filter(Boolean).join(" · ")),
    fieldBox(error.field) && el("button", { type: "button", onclick: () => focusField(error.field) }, `Go to “${fieldLabel(error.field)}”`),
    fold("Last lines of the output", error.log_tail, true),
    fold("Story", error.story, false),
  );
}

function fold(title, lines, open) {
  if (!lines?.length) return null;
  const text = el("pre", { tabIndex: 0, "aria-label": title }, lines.join("\n"));
  const box = el("details", { open }, el("summary", {}, title), text);
  box.addEventListener("toggle", () => (text.scrollTop = text.scrollHeight)); // also when it opens at first
  return box;
}
