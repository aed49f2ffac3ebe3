/** The last loads on one scale: the time of each phase, and the outcome. */

import { $, el, named, put, say, seconds } from "./dom.js";
import { isQuiet } from "./words.js";
import { problem } from "./view.js";

const PHASES = { kill: "kill", download: "download", spawn: "spawn", health: "load" };
const OF_STATE = { Killing: "kill", Downloading: "download", Spawning: "spawn", WaitingHealth: "health" };
const shown = new Map(); // generation -> the data of its row
let last = [];
let onAgain = (_load) => {};

/** @param {(load: any) => void} again called when a load is to be made again */
export const offer = (again) => (onAgain = again);

/** @param {any[]} loads newest first */
export function show(loads) {
  last = loads;
  $("no-loads").hidden = loads.length > 0;
  const rows = new Map([...$("loads").children].map((row) => [row.dataset.generation, row]));
  const wanted = loads.map((load) => {
    const key = JSON.stringify([load.state, load.timings_s, load.gguf_variant, Boolean(load.outcome)]);
    const old = rows.get(String(load.generation));
    const row = old && shown.get(load.generation) === key ? old : rowOf(load);
    shown.set(load.generation, key);
    return row;
  });
  const isSame = wanted.length === rows.size && wanted.every((row, at) => row === $("loads").children[at]);
  if (!isSame) $("loads").replaceChildren(...wanted);
  tick();
}

/** Once a second: the running phase grows, and with it perhaps the scale. */
export function tick() {
  const scale = Math.max(0.001, ...last.map(total));
  for (const load of last) {
    const row = $("loads").querySelector(`[data-generation="${load.generation}"]`);
    if (!row) continue;
    const bar = row.querySelector(".bar");
    bar.style.width = `${(100 * total(load)) / scale}%`;
    if (load.outcome) continue;
    const spent = phases(load);
    for (const part of bar.children) part.style.flexGrow = String(1000 * (spent[part.className] ?? 0));
    say(row.querySelector(".took"), seconds(Math.floor(total(load))));
  }
  $("axis").hidden = !last.length;
  put($("axis"), el("span", {}, "0"), el("span", {}, seconds(scale / 2)), el("span", {}, seconds(scale)));
}

/** Seconds by phase; the one that runs has what the others have not. */
function phases(load) {
  const spent = {};
  for (const name of Object.keys(PHASES)) if (load.timings_s[name] !== null) spent[name] = load.timings_s[name];
  const running = load.outcome ? null : OF_STATE[load.state];
  if (running) {
    const before = Object.values(spent).reduce((sum, s) => sum + s, 0) - (spent[running] ?? 0);
    spent[running] = Math.max(0, Date.now() / 1000 - load.accepted_at - before);
  }
  return spent;
}

const total = (load) => Object.values(phases(load)).reduce((sum, s) => sum + s, 0);

function rowOf(load) {
  const spent = Object.entries(phases(load));
  const [word, css] = outcomeWord(load);
  const parts = spent.map(([name, s], at) => {
    const isWhere = css === "bad" && at === spent.length - 1;
    const part = el("i", { class: isWhere ? `${name} broke` : name, title: `${PHASES[name]} ${seconds(s)}${isWhere ? ", failed here" : ""}` });
    part.style.flexGrow = String(1000 * s); // less than 1 in all does not fill the bar
    return part;
  });
  const texts = spent.map(([name, s]) => `${PHASES[name]} ${seconds(s)}`).join(", ");
  const again = load.outcome && el("button", { type: "button", class: "quiet again", "aria-label": `Load generation ${load.generation} again`, onclick: () => onAgain(load) }, "Load again");
  const row = el(
    "li",
    { "data-generation": String(load.generation) },
    el("span", { class: "number" }, el("span", { class: "unseen" }, "Generation "), String(load.generation)),
    el("span", { class: "name", title: load.model_path }, named(load)),
    el("span", { class: `became ${css}` }, word),
    el("span", { class: "took" }, load.took_s === null ? "…" : seconds(load.took_s)),
    again,
    el("div", { class: "track", "aria-hidden": "true" }, el("div", { class: "bar" }, ...parts)),
    el("span", { class: "unseen" }, texts),
  );
  if (css === "bad") row.append(el("details", {}, el("summary", {}, "What happened"), problem(load.outcome)));
  return row;
}

function outcomeWord({ outcome, state }) {
  if (!outcome) return [state === "Idle" ? "queued" : state, "busy"];
  if (!outcome.category) return ["loaded", "good"];
  return [outcome.category.replaceAll("_", " "), isQuiet(outcome) ? "quiet" : "bad"];
}
