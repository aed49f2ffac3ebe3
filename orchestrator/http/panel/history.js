/** The last loads: the time of each phase, and the outcome. */

import { $, el, named, seconds } from "./dom.js";
import { problem } from "./view.js";

const PHASES = { kill: "kill", download: "download", spawn: "spawn", health: "load" };
const shown = new Map(); // generation -> the data of its row

/** @param {any[]} loads newest first */
export function show(loads) {
  $("no-loads").hidden = loads.length > 0;
  const longest = Math.max(0.001, ...loads.map(total));
  const rows = new Map([...$("loads").children].map((row) => [row.dataset.generation, row]));
  const wanted = loads.map((load) => {
    const key = JSON.stringify([load.state, load.timings_s, load.gguf_variant, Boolean(load.outcome)]);
    const old = rows.get(String(load.generation));
    const row = old && shown.get(load.generation) === key ? old : rowOf(load);
    shown.set(load.generation, key);
    row.querySelector(".bar").style.width = `${Math.max(4, 100 * Math.sqrt(total(load) / longest))}%`;
    return row;
  });
  const isSame = wanted.length === rows.size && wanted.every((row, at) => row === $("loads").children[at]);
  if (!isSame) $("loads").replaceChildren(...wanted);
}

const phases = (load) => Object.keys(PHASES).filter((name) => load.timings_s[name] !== null);
const total = (load) => phases(load).reduce((sum, name) => sum + load.timings_s[name], 0);

function rowOf(load) {
  const parts = phases(load).map((name) => {
    const part = el("i", { class: name, title: `${PHASES[name]} ${seconds(load.timings_s[name])}` });
    part.style.flexGrow = String(load.timings_s[name] / (total(load) || 1));
    return part;
  });
  const [word, css] = outcomeWord(load);
  const spent = phases(load).map((name) => `${PHASES[name]} ${seconds(load.timings_s[name])}`).join(", ");
  const row = el(
    "li",
    { "data-generation": String(load.generation) },
    el("span", { class: "number" }, el("span", { class: "unseen" }, "Generation "), String(load.generation)),
    el("span", { class: "name", title: load.model_path }, named(load)),
    el("span", { class: `became ${css}` }, word),
    el("span", { class: "took" }, load.took_s === null ? "…" : seconds(load.took_s)),
    el("div", { class: "track", "aria-hidden": "true" }, el("div", { class: "bar" }, ...parts)),
    el("span", { class: "unseen" }, spent),
  );
  if (css === "bad") row.append(el("details", {}, el("summary", {}, "What happened"), problem(load.outcome)));
  return row;
}

function outcomeWord({ outcome, state }) {
  if (!outcome) return [state === "Idle" ? "queued" : state, "busy"];
  if (!outcome.category) return ["loaded", "good"];
  const isQuiet = outcome.category === "superseded" || outcome.category === "cancelled";
  return [outcome.category.replaceAll("_", " "), isQuiet ? "quiet" : "bad"];
}
