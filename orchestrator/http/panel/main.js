/** Wires the panel: each event triggers a request of the status, and only that is shown. */

import { dropKey, gate, get, hasKey, keepKey, post } from "./api.js";
import { apply, onStatus, planSoon, settle } from "./apply.js";
import * as diagram from "./diagram.js";
import { $, say } from "./dom.js";
import { fill, offer, watch } from "./form.js";
import * as history from "./history.js";
import * as log from "./log.js";
import { eventParser, follow } from "./stream.js";
import * as view from "./view.js";

const ROWS = 12;
const RESTING_S = 15; // between two requests of the status while nothing changes

let lastEvent = "0"; // events from before this page trace the path in the diagram
let status = null;
let asking = null;
let askAgain = false;
let lastRest = "";

/** Request the status, and once more if an event arrives meanwhile. */
function refresh() {
  if (asking) return void (askAgain = true);
  asking = (async () => {
    try {
      const [now, past] = [await get("status"), await get(`loads?limit=${ROWS}`)];
      show(now, past.loads);
    } catch {
      // the event stream shows that the backend is away, and refreshes when it is back
    } finally {
      asking = null;
      if (askAgain) refresh();
      askAgain = false;
    }
  })();
}

function show(now, loads) {
  status = now;
  view.show(now);
  history.show(loads);
  settle(loads);
  fill(now.loaded);
  onStatus(now);
  if (!now.loading) diagram.light(now.state);
  announce(now);
}

/** Tell screen readers the state in which the machine rests. */
function announce(now) {
  const rests = now.state === "Healthy" ? `Healthy: ${now.loaded?.model_path}` : now.state;
  if (!now.loading && rests !== lastRest) say($("announce"), rests);
  lastRest = rests;
}

const isMoving = () => status?.loading || status?.recovery || status?.prefetching.length;
let rested = 0;

/** Once a second. */
function poll() {
  view.tick();
  rested = isMoving() ? RESTING_S : rested + 1;
  if (document.hidden || !status || rested < RESTING_S) return;
  rested = 0;
  refresh();
}

const events = follow("events", {
  headers: () => ({ "Last-Event-ID": lastEvent }),
  onOpen: async () => {
    say($("link"), "live");
    $("link").className = "link live";
    $("key").hidden = true;
    refresh();
    if (!$("diagram").firstChild) await diagram.draw().catch(() => {});
    get("options").then(offer, () => {}); // without a server binary, the plan shows the error
    log.retry();
  },
  onText: eventParser(({ id, kind, data }) => {
    if (id) lastEvent = id;
    if (kind === "progress") return view.progress(data);
    diagram.step(data);
    refresh();
  }),
  onLost: (why) => {
    say($("link"), why === "locked" ? "locked" : "reconnecting …");
    $("link").className = `link ${why}`;
  },
});

gate.onLocked = () => {
  if (!$("key").hidden) return;
  $("key").hidden = false;
  say($("key-error"), hasKey() ? "That key was not accepted." : "");
  dropKey();
  $("api-key").focus();
};

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey($("api-key").value);
  $("api-key").value = "";
  $("key").hidden = true;
  events.retry();
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  apply().then(refresh);
});
$("match").addEventListener("click", () => {
  fill(status?.loaded, { force: true });
  planSoon();
});
$("cancel").addEventListener("click", async () => {
  if (status?.loading) await post("cancel", { generation: status.loading.generation }).catch(() => {});
  refresh();
});
$("unload").addEventListener("click", async () => {
  await post("unload", {}).catch(() => {});
  refresh();
});
$("cut").addEventListener("click", async () => {
  // the model is named, so that a load of another one, which waits for these requests, goes on
  const found = await get("loads").catch(() => ({ loads: [] }));
  const running = found.loads.find((load) => load.state === "Healthy");
  await post("unload", { model_path: running?.model_path ?? null, cut: true }).catch(() => {});
  refresh();
});
$("follow").addEventListener("change", log.toggle);
watch(planSoon);
log.toggle();
planSoon();
setInterval(poll, 1000);
