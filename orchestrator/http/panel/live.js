/** The figures of the moment, each with the last minutes as a line, and the last requests. */

import { get } from "./api.js";
import { $, clock, el, mib, put, say, seconds } from "./dom.js";

const BUSY_S = 2; // between two requests of the figures while requests are answered
const RESTING_S = 30; // each request of a status hurries it
const ROWS = 50;
const SVG = "http://www.w3.org/2000/svg";

const rate = (n) => (n >= 10 || n === 0 ? String(Math.round(n)) : n.toFixed(1));
const plain = (n) => String(n);
const FIGURES = [
  ["in_flight", "In flight", plain],
  ["waiting", "Waiting", plain],
  ["tokens_per_s", "Tokens/s", rate],
  ["prompt_tokens_per_s", "Prompt tokens/s", rate],
  ["first_byte_s", "First byte", seconds],
  ["memory_mib", "Model memory", mib],
  ["free_mib", "Free memory", mib],
];
const SUMS = new Set(["tokens_per_s", "prompt_tokens_per_s"]); // of a step, which may just have begun

let model = null;
let onChange = () => {}; // requests have come or gone
let rested = Infinity;
let busy = false;
let counted = "";
let requests = [];
const speeds = new Map();
const shown = new Map(); // figure -> its elements
const filter = el("input", { type: "search", placeholder: "Show only requests with …", "aria-label": "Show only requests with", spellcheck: false, autocomplete: "off" });
const body = el("tbody");
const none = el("p", { class: "soft" }, "None yet.");

/** How fast the last answer of a model was. */
export const speedOf = (name) => speeds.get(name);

/** @param {string | null} of the model that is shown; null: all of them @param {() => void} [changed] */
export function start(of, changed = () => {}) {
  model = of;
  onChange = changed;
  for (const [name, label] of FIGURES) {
    const made = { value: el("strong", {}, "–"), line: line() };
    shown.set(name, made);
    $("live").append(el("div", { class: "figure" }, el("span", { class: "soft" }, label), made.value, made.line));
  }
  const heads = ["Time", "Model", "Request", "Status", "Prompt", "Answer", "Tokens/s", "Waited", "First byte", "Total"];
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), body);
  put($("activity"), filter, el("div", { class: "scroll", tabIndex: 0, role: "group", "aria-label": "Last requests" }, table), none);
  filter.addEventListener("input", list);
  list();
  setInterval(poll, 1000);
  poll();
}

/** Something has changed: request the figures soon. */
export const hurry = () => (rested = RESTING_S);

/** Once a second. */
async function poll() {
  rested += 1;
  if (document.hidden || rested < (busy ? BUSY_S : RESTING_S)) return;
  rested = 0;
  const query = model === null ? "" : `model=${encodeURIComponent(model)}`;
  try {
    const { points } = await get(`/api/usage?${query}`);
    const was = busy;
    figures(points);
    const key = JSON.stringify(points.filter((one) => one.requests).map((one) => [one.at, one.requests]));
    if (key !== counted) {
      requests = await get(`/api/activity?limit=${ROWS}&${query}`);
      counted = key;
      speeds.clear();
      for (const one of [...requests].reverse()) if (one.tokens_per_s) speeds.set(one.model, `${rate(one.tokens_per_s)} t/s`);
      list();
    } else if (busy === was) return;
    onChange();
  } catch {
    // the event stream shows that the service is away
  }
}

function figures(points) {
  const last = points.at(-1);
  busy = last.in_flight > 0 || last.waiting > 0;
  for (const [name, label, text] of FIGURES) {
    const values = points.map((one) => one[name]);
    const now = SUMS.has(name) ? values.at(-1) || values.at(-2) || 0 : (values.at(-1) ?? values.findLast((one) => one !== null) ?? null);
    const { value, line } = shown.get(name);
    say(value, now === null ? "–" : text(now));
    draw(line, values);
    const highest = Math.max(0, ...values.filter((one) => one !== null));
    line.setAttribute("aria-label", `${label} in the last minutes: at most ${text(highest)}`);
  }
}

function line() {
  const svg = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img", "aria-label": "" })) svg.setAttribute(name, value);
  svg.append(document.createElementNS(SVG, "path"));
  return svg;
}

/** A gap where a value is not known. */
function draw(svg, values) {
  const top = Math.max(...values, 1e-9);
  const step = 100 / Math.max(1, values.length - 1);
  let pen = "M";
  const parts = values.map((value, at) => {
    if (value === null) return void (pen = "M");
    const part = `${pen}${(at * step).toFixed(1)} ${(23 - (21 * value) / top).toFixed(1)}`;
    pen = "L";
    const isAlone = (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null;
    return isAlone ? `${part}h.01` : part;
  });
  svg.firstChild.setAttribute("d", parts.filter(Boolean).join("") || "M0 23");
}

function list() {
  const words = filter.value.trim().toLowerCase();
  const text = (one) => [one.model, one.path, one.status, one.key].join(" ").toLowerCase();
  const some = requests.filter((one) => text(one).includes(words));
  none.hidden = some.length > 0;
  body.parentNode.hidden = !some.length;
  filter.hidden = !requests.length;
  say(none, requests.length ? "None of these." : "None yet.");
  put(body, some.map(rowOf));
}

function rowOf(one) {
  const known = (value, format) => (value === null || value === undefined ? "–" : format(value));
  const cached = one.cached_tokens ? ` (${one.cached_tokens} cached)` : "";
  const cells = [
    clock(1000 * one.at),
    one.model ?? "–",
    one.path.replace(/^\/v1\//, ""),
    String(one.status),
    known(one.prompt_tokens, plain) + cached,
    known(one.completion_tokens, plain),
    known(one.tokens_per_s, rate),
    known(one.wait_s, seconds),
    known(one.first_byte_s, seconds),
    known(one.total_s, seconds),
  ];
  return el("tr", { class: one.status >= 400 ? "bad" : "" }, ...cells.map((cell) => el("td", {}, cell)));
}
