/** The way of a load as steps, each with its time; the present one grows. */

import { $, el, put, seconds } from "./dom.js";
import { isQuiet } from "./words.js";

const STEPS = { Idle: null, Killing: "kill", Downloading: "download", Spawning: "spawn", WaitingHealth: "health", Healthy: null };
const NAMES = Object.keys(STEPS);

let status = null;
let timings = {};
let since = 0; // when the present state was entered, by this page's clock

/** @param {any} now a status @param {any} load the newest load, if there is one */
export function show(now, load) {
  status = now;
  since = Date.now() - now.uptime_s * 1000;
  timings = load?.timings_s ?? {};
  draw(load);
}

/** Once a second. */
export function tick() {
  const time = status && $("steps").querySelector(".at .time");
  if (time) time.textContent = spent();
}

const spent = () => seconds(Math.max(1, Math.floor((Date.now() - since) / 1000)));

function draw(load) {
  const at = NAMES.indexOf(status.state);
  const failed = status.state === "Idle" && !isQuiet(status.last_error) ? failedAt(load) : null;
  const steps = NAMES.map((name, n) => {
    const took = timings[STEPS[name]];
    const isPast = STEPS[name] && took !== null && took !== undefined && (n < at || status.state === "Idle" || status.state === "Healthy");
    const css = n === at ? "at" : name === failed ? "failed" : isPast ? "past" : "";
    const text = n === at ? spent() : isPast ? seconds(took) : "";
    const mark = marks(name);
    return el(
      "li",
      { class: css, ...(n === at ? { "aria-current": "step" } : {}) },
      el("span", { class: "step" }, name),
      el("span", { class: "time" }, text),
      (mark || name === failed) && el("span", { class: `mark ${name === failed || (name === "Healthy" && n !== at) ? "bad" : ""}` }, mark || "failed here"),
    );
  });
  put($("steps"), steps);
}

/** The last phase that a failed load has spent time in. */
function failedAt(load) {
  if (!load?.outcome?.category) return null;
  const phase = ["health", "spawn", "download", "kill"].find((one) => timings[one] !== null && timings[one] !== undefined);
  return NAMES.find((name) => STEPS[name] === phase) ?? null;
}

/** What is unusual about a step: an adoption, a hang, a restart. */
function marks(name) {
  const { loaded, recovery, last_exit: exit, state } = status;
  if (name === "Healthy" && loaded?.adopted) return "adopted";
  if (name === "Healthy" && state !== "Healthy" && recovery) return exit?.reason === "hung" ? "hung" : "exited";
  if (name === "Idle" && recovery) return { waiting: `restart ${recovery.failures} follows`, trying: "restarts", cooling_down: "cools down" }[recovery.phase];
  return "";
}
