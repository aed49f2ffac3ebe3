/** The pool at a glance: its budget, its models as rows, and what a click would do. */

import { get, post, V1 } from "./api.js";
import { $, ago, copier, el, mib, put, say } from "./dom.js";
import { finder } from "./find.js";
import * as live from "./live.js";
import { connect } from "./shell.js";
import { isMoving, plainly, tone } from "./words.js";

const BUSY_S = 2; // between two requests of the pool's status while something happens
const RESTING_S = 60; // neither events nor figures tell of a change
const PLAN_AFTER_MS = 200;
const NONE = "–";
const MOST_PLANS = 24; // of more models only that whose button has the focus

let pool = { budget: [], models: [], waiting: [] };
let asking = false;
let askAgain = false;
let rested = 0;
let planTimer = 0;
let isReader = false; // the key may change nothing
let planned = ""; // what the plans were made for
const plans = new Map(); // name -> the plan of a load
const steps = new Map(); // name -> the progress of a load
const rows = new Map(); // name -> its elements
const errors = new Map(); // name -> what its last button has failed with

const path = (name, rest = "") => `/api/models/${encodeURIComponent(name)}${rest}`;

async function refresh() {
  if (asking) return void (askAgain = true);
  asking = true;
  try {
    show(await get("/api/models"));
  } catch {
    // the event stream shows that the service is away, and refreshes when it is back
  }
  asking = false;
  if (askAgain) refresh();
  askAgain = false;
}

function show(now) {
  pool = now;
  const { models } = pool;
  live.hurry();
  for (const { name, state } of models) if (!isMoving(state)) steps.delete(name);
  for (const name of rows.keys()) if (!models.some((one) => one.name === name)) rows.delete(name);
  const wanted = models.map((one) => (rows.get(one.name) ?? newRow(one.name)).row);
  if (wanted.some((row, at) => row !== $("rows").children[at]) || wanted.length !== $("rows").children.length) put($("rows"), wanted);
  for (const one of models) fill(one);
  $("no-models").hidden = models.length > 0;
  const ready = models.filter((one) => one.state === "Healthy").length;
  say($("total"), `${ready} of ${models.length} ready`);
  document.title = `${ready} of ${models.length} ready · llama-orchestrator`;
  put($("budget"), pool.budget.map(budgetBar));
  const key = JSON.stringify([pool.budget, models.map((one) => [one.name, one.state, one.pinned, one.memory?.mib])]);
  if (key !== planned) {
    planned = key;
    clearTimeout(planTimer);
    planTimer = setTimeout(planAll, PLAN_AFTER_MS);
  }
}

// --------------------------------------------------------------------------------- the budget

/** One device: the share of each model that holds memory, and what is free. */
function budgetBar({ device, total_mib: total, reserved_mib: reserved }) {
  const held = pool.models.filter((one) => one.state !== "Idle" && one.memory?.devices[device]);
  const free = Math.max(0, total - reserved);
  const share = ({ name, memory, pinned }, at) => {
    const part = el("i", { class: `share s${at % 5}`, title: `${name} ${mib(memory.devices[device])}` }, el("span", {}, pinned ? `${name} (pinned)` : name));
    part.style.flexGrow = String(memory.devices[device]);
    return part;
  };
  const rest = el("i", { class: "free" });
  rest.style.flexGrow = String(free);
  const parts = held.map(({ name, memory }) => `${name} ${mib(memory.devices[device])}`);
  return el(
    "div",
    {},
    el("p", { class: "budget-text" }, el("strong", {}, device), ` ${mib(reserved)} of ${mib(total)} reserved, ${mib(free)} free`),
    el("div", { class: "shares", role: "img", "aria-label": parts.length ? `${device}: ${parts.join(", ")}` : `${device}: nothing is reserved` }, ...held.map(share), rest),
  );
}

// ----------------------------------------------------------------------------------- the rows

function newRow(name) {
  const cell = (label) => el("td", { "data-label": label });
  const made = { name: el("td"), state: el("td"), memory: el("td"), requests: cell("Requests"), speed: cell("Speed"), used: cell("Last use"), hint: el("p", { class: "soft plan-hint" }) };
  made.load = el("button", { type: "button", class: "main", "aria-label": `Load ${name}`, onfocus: () => planOne(name), onclick: () => act(name, "load?wait=false") }, "Load");
  made.stop = el("button", { type: "button", class: "main", "aria-label": `Unload ${name}`, onclick: () => act(name, "unload") }, "Unload");
  made.cancel = el("button", { type: "button", class: "main", "aria-label": `Cancel the load of ${name}`, onclick: () => act(name, "cancel") }, "Cancel");
  made.pin = el("button", { type: "button", "aria-label": `Pin ${name}`, title: "A pinned model is never evicted, and not unloaded when idle", onclick: () => act(name, "pin", { pinned: made.pin.ariaPressed !== "true" }) }, "Pin");
  const open = el("a", { class: "open", href: `model?name=${encodeURIComponent(name)}` }, name);
  made.about = el("span", { class: "soft" });
  made.name.append(open, " ", made.about, made.hint);
  made.row = el("tr", { "data-model": name }, made.name, made.state, made.memory, made.requests, made.speed, made.used, el("td", { class: "buttons" }, made.load, made.stop, made.cancel, made.pin));
  rows.set(name, made);
  return made;
}

function fill(one) {
  const made = rows.get(one.name);
  const moving = isMoving(one.state);
  const isElsewhere = one.state === "Healthy" && one.pid === null;
  say(made.about, [one.kind, isElsewhere && "another server", ...one.aliases, ...one.presets.map((preset) => `:${preset}`)].filter(Boolean).join(" · "));
  const step = steps.get(one.name);
  const part = step?.fraction ? ` ${Math.floor(100 * step.fraction)} %` : "";
  put(made.state, el("span", { class: `dot ${tone(one)}`, "aria-hidden": "true" }), el("span", {}, plainly(one) + part), el("span", { class: "soft" }, ` ${one.state}`));
  put(made.memory, one.memory ? mib(one.memory.mib) : "–", one.memory && el("span", { class: "soft" }, ` ${one.state === "Idle" ? "needed" : one.memory.source}`));
  say(made.requests, [one.leases && `${one.leases} running`, one.waiting && `${one.waiting} waiting`].filter(Boolean).join(", ") || NONE);
  say(made.speed, live.speedOf(one.name) ?? NONE);
  say(made.used, one.leases ? "now" : one.last_used_at === null ? NONE : ago(one.last_used_at));
  for (const one of [made.requests, made.speed, made.used]) one.classList.toggle("none", one.textContent === NONE);
  const isWanted = moving || (one.state === "Idle" && one.waiting > 0);
  made.load.hidden = one.state !== "Idle" || isWanted;
  made.stop.hidden = one.state !== "Healthy" || isElsewhere;
  made.cancel.hidden = !isWanted || one.state === "Killing";
  made.pin.hidden = isElsewhere;
  made.pin.ariaPressed = String(one.pinned);
  say(made.pin, one.pinned ? "Pinned" : "Pin");
  hint(one);
}

/** What a click on Load would do, or why the last one has failed. */
function hint(one) {
  const made = rows.get(one.name);
  const plan = plans.get(one.name);
  const [text, css] = errors.has(one.name)
    ? [errors.get(one.name), "wrong"]
    : one.state === "Idle" && one.last_error && tone(one) === "failed"
      ? [one.last_error.detail, "wrong"]
      : one.state === "Idle" && plan
        ? [plan.fits === false ? whyNot(one) : plan.evict?.length ? `Load stops ${plan.evict.join(", ")}.` : "", "soft"]
        : ["", "soft"];
  made.hint.className = `plan-hint ${css}`;
  say(made.hint, text);
}

/** Why a model cannot be loaded, from what it needs and what the pinned ones hold. */
function whyNot({ name, memory }) {
  for (const { device, total_mib: total } of pool.budget) {
    const need = memory?.devices[device] ?? 0;
    if (need > total) return `Does not fit: it needs ${mib(need)} on ${device}, and the budget is ${mib(total)}.`;
    const pins = pool.models.filter((one) => one.pinned && one.name !== name && one.state !== "Idle" && one.memory?.devices[device]);
    const held = pins.reduce((sum, one) => sum + one.memory.devices[device], 0);
    if (need > total - held) return `Does not fit: it needs ${mib(need)} on ${device}; of ${mib(total)}, ${mib(held)} are held by pinned models (${pins.map((one) => one.name).join(", ")}).`;
  }
  return "Does not fit beside the pinned models.";
}

async function planOne(name) {
  try {
    plans.set(name, await post(path(name, "/plan"), {}));
  } catch (error) {
    plans.delete(name); // its page says why
    isReader ||= /** @type {any} */ (error).problem?.status === 403;
    document.body.classList.toggle("reader", isReader);
  }
  const one = pool.models.find((model) => model.name === name);
  if (one && rows.has(name)) hint(one);
}

async function planAll() {
  plans.clear();
  if (isReader) return;
  const idle = pool.models.filter((one) => one.state === "Idle" && !one.waiting);
  if (idle.length <= MOST_PLANS) for (const { name } of idle) await planOne(name);
}

async function act(name, what, body = {}) {
  errors.delete(name);
  try {
    const { generation } = await post(path(name, `/${what}`), body);
    if (generation) followLoad(name, generation);
  } catch (error) {
    errors.set(name, /** @type {any} */ (error).message);
  }
  refresh();
}

/** A load that is refused before its server starts is told only to who asks for its outcome. */
async function followLoad(name, generation) {
  for (;;) {
    const found = await get(path(name, `/loads/${generation}?wait_s=25`)).catch(() => ({ outcome: {} }));
    if (!found.outcome) continue;
    const { category, detail, title } = found.outcome;
    if (category && category !== "cancelled") errors.set(name, detail ?? title);
    say($("announce"), category ? `${name}: ${category.replaceAll("_", " ")}` : `${name} is ready.`);
    return refresh();
  }
}

// ------------------------------------------------------------------------------------- the page

$("add").addEventListener("submit", async (event) => {
  event.preventDefault();
  say($("add-error"), "");
  try {
    await post("/api/models", { name: $("add-name").value.trim(), model_path: $("model_path").value.trim(), kind: $("add-kind").value });
    $("add").reset();
    refresh();
  } catch (error) {
    say($("add-error"), /** @type {any} */ (error).message);
  }
});

connect(
  "/api/events",
  refresh,
  ({ kind, data }) => {
    if (kind !== "progress") return refresh();
    steps.set(data.model, data);
    const one = pool.models.find((model) => model.name === data.model);
    if (one) fill(one);
  },
);
say($("v1"), V1);
put($("v1-copy"), copier(V1));
$("find").append(
  finder("/api/", (model) => {
    $("model_path").value = model;
    $("add-name").focus();
  }),
);
live.start(null, refresh);
setInterval(() => {
  const isBusy = pool.models.some((one) => one.leases || one.waiting || isMoving(one.state));
  rested += 1;
  if (document.hidden || rested < (isBusy ? BUSY_S : RESTING_S)) return;
  rested = 0;
  refresh();
}, 1000);
