/** What every page has: the connection with its banner, and the request for a key. */

import { dropKey, gate, hasKey, keepKey } from "./api.js";
import { $, clock, say } from "./dom.js";
import { eventParser, follow } from "./stream.js";

let lastEvent = "0"; // events from before this page trace the path in the diagram
let lostAt = 0;

/**
 * Follow a stream of events. While it is lost, what the page shows is grey.
 * @param {string} path
 * @param {() => void} onOpen
 * @param {(event: {kind: string, data: any}) => void} onEvent
 */
export function connect(path, onOpen, onEvent) {
  const events = follow(path, {
    headers: () => ({ "Last-Event-ID": lastEvent }),
    onOpen: () => {
      lostAt = 0;
      show("live", "live");
      $("key").hidden = true;
      onOpen();
    },
    onText: eventParser(({ id, kind, data }) => {
      if (id) lastEvent = id;
      onEvent({ kind, data });
    }),
    onLost: (why) => {
      lostAt ||= Date.now();
      show(why, why === "locked" ? "locked" : "reconnecting …");
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
}

function show(css, text) {
  say($("link"), text);
  $("link").className = `link ${css}`;
  const isStale = css === "lost";
  document.body.classList.toggle("stale", isStale);
  $("banner").hidden = !isStale;
  say($("banner"), isStale ? `The service has not answered since ${clock(lostAt)}. What is shown is from before that.` : "");
}
