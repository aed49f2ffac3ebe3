/** Wires the page of a slot, or of one model of a pool: each event triggers a request of the status,
 * and only that is shown.
 */

import { MODEL, V1, get, post } from "./api.js";
import { again, apply, onStatus, planSoon, prefetch, settle } from "./apply.js";
import * as chat from "./chat.js";
import * as diagram from "./diagram.js";
import { $, copier, el, put, say } from "./dom.js";
import { finder } from "./find.js";
import { fill, listVariants, offer, refill, watch } from "./form.js";
import * as history from "./history.js";
import * as live from "./live.js";
import * as log from "./log.js";
import { connect } from "./shell.js";
import * as steps from "./steps.js";
import * as view from "./view.js";

const ROWS = 12;
const RESTING_S = 60; // between two requests of the status while neither events nor figures tell of a change

const opened = Date.now();

let status = null;
let loads = []; // newest first
let told = ""; // of what moment they are
let asking = null;
let askAgain = false;
let lastRest = "";

/** Request the status, and once more if an event arrives meanwhile. */
function refresh() {
  if (asking) return void (askAgain = true);
  asking = (async () => {
    try {
      const now = await get("status");
      const moment = JSON.stringify([now.generation, now.since, now.last_error, now.loading]);
      if (moment !== told || now.loading) loads = (await get(`loads?limit=${ROWS}`)).loads;
      told = moment;
      show(now);
    } catch {
      // the event stream shows that the backend is away, and refreshes when it is back
    } finally {
      asking = null;
      if (askAgain) refresh();
      askAgain = false;
    }
  })();
}

function show(now) {
  status = now;
  const newest = loads[0] ?? null;
  view.show(now, newest);
  steps.show(now, newest);
  history.show(loads);
  log.explain(now.last_error);
  chat.show(now.loaded);
  live.hurry();
  settle(loads);
  if (MODEL === null) {
    fill(now.loaded);
    if (!now.loaded && newest) refill(newest.request);
  }
  onStatus(now);
  if (!now.loading) diagram.light(now.state);
  announce(now);
}

/** Tell screen readers the state in which the machine rests. */
function announce(now) {
  const rests = now.state === "Healthy" ? `Healthy: ${MODEL ?? now.loaded?.model_path}` : now.state;
  if (!now.loading && rests !== lastRest) say($("announce"), rests);
  lastRest = rests;
}

const isMoving = () => status?.loading || status?.recovery || status?.prefetching.length;
let rested = 0;

/** Once a second. */
function poll() {
  view.tick();
  steps.tick();
  if (status?.loading) history.tick();
  rested = isMoving() ? RESTING_S : rested + 1;
  if (document.hidden || !status || rested < RESTING_S) return;
  rested = 0;
  refresh();
}

connect(
  "events",
  async () => {
    refresh();
    if (MODEL === null) get("options").then(offer, () => {}); // without a binary, the plan shows the error
    log.retry();
    if (!$("diagram").firstChild) await diagram.draw().catch(() => {});
  },
  ({ kind, data }) => {
    if (kind === "progress") return view.progress(data);
    diagram.step(data);
    if (data.dest === "Spawning") log.divide(data.generation, { isBefore: 1000 * data.at < opened });
    refresh();
  },
);

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  apply().then(refresh);
});
$("match").addEventListener("click", () => {
  fill(status?.loaded, { force: true });
  planSoon();
});
$("cancel").addEventListener("click", async () => {
  if (status?.loading) await post("cancel", MODEL === null ? { generation: status.loading.generation } : {}).catch(() => {});
  refresh();
});
$("unload").addEventListener("click", async () => {
  await post("unload", {}).catch(() => {});
  refresh();
});
$("cut").addEventListener("click", async () => {
  if (MODEL !== null) return void post("unload", { cut: true }).then(refresh, () => {});
  // the model is named, so that a load of another one, which waits for these requests, goes on
  const found = await get("loads").catch(() => ({ loads: [] }));
  const running = found.loads.find((load) => load.state === "Healthy");
  await post("unload", { model_path: running?.model_path ?? null, cut: true }).catch(() => {});
  refresh();
});
$("again").addEventListener("click", () => loads.length && again(loads[0]).then(refresh));
$("prefetch-only").addEventListener("click", prefetch);
history.offer((load) => again(load).then(refresh));
$("follow").addEventListener("change", log.toggle);
if (MODEL === null) {
  watch(planSoon);
  $("find").append(
    finder("", (model) => {
      $("model_path").value = model;
      $("form").dispatchEvent(new Event("input"));
      listVariants();
      $("model_path").focus();
    }),
  );
} else {
  $("settings").hidden = true;
  put($("title"), el("a", { href: "./" }, "All models"), ` / ${MODEL}`);
  say($("form-title"), "Load");
  say($("apply"), "Load");
}
say($("v1"), V1);
put($("v1-copy"), copier(V1));
live.start(MODEL, refresh);
log.toggle();
setInterval(poll, 1000);
