/** Streams that reconnect: after a restart of the backend, a pause or a lost network. */

import { request } from "./api.js";

const FIRST_WAIT_MS = 250;
const LONGEST_WAIT_MS = 8000;
const SILENCE_MS = 45000; // the event stream has a keep-alive every 15 s

/**
 * Read a stream of text until it is stopped. A hidden page closes it: a browser allows six
 * connections to a host, and other tabs need some.
 * @param {string} path
 * @param {object} handlers
 * @param {() => Record<string, string>} [handlers.headers] called before every connection
 * @param {() => void} handlers.onOpen
 * @param {(text: string) => void} handlers.onText
 * @param {(why: "lost"|"locked", waitMs: number) => void} handlers.onLost
 * @param {boolean} [handlers.mayBeSilent]
 * @returns {{stop: () => void, retry: () => void}}
 */
export function follow(path, handlers) {
  let stopped = false;
  let wake = () => {};
  let isDue = false; // another attempt was asked for while one was made
  let current = new AbortController();
  const retry = () => {
    isDue = true;
    wake();
  };
  const onVisible = () => (document.hidden ? current.abort() : retry());
  document.addEventListener("visibilitychange", onVisible);
  window.addEventListener("online", retry);

  async function once() {
    current = new AbortController();
    const { signal } = current;
    const answer = await request(path, { headers: handlers.headers?.() ?? {}, signal });
    handlers.onOpen();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let timer;
    for (;;) {
      if (!handlers.mayBeSilent) timer = setTimeout(() => current.abort(), SILENCE_MS);
      const { value, done } = await reader.read();
      clearTimeout(timer);
      if (done) return;
      handlers.onText(value);
    }
  }

  (async () => {
    let failures = 0;
    while (!stopped) {
      if (document.hidden) await new Promise((resolve) => (wake = resolve));
      let locked = false;
      isDue = false;
      const at = Date.now();
      try {
        await once();
      } catch (error) {
        locked = /** @type {any} */ (error).problem?.status === 401;
      }
      if (stopped) return;
      failures = Date.now() - at > LONGEST_WAIT_MS ? 0 : failures + 1;
      const waitMs = Math.min(FIRST_WAIT_MS * 2 ** failures, LONGEST_WAIT_MS) * (0.75 + Math.random() / 4);
      handlers.onLost(locked ? "locked" : "lost", waitMs);
      await new Promise((resolve) => {
        wake = () => resolve(undefined);
        if (isDue) wake();
        else if (!locked) setTimeout(wake, waitMs);
      });
    }
  })();

  const stop = () => {
    stopped = true;
    document.removeEventListener("visibilitychange", onVisible);
    window.removeEventListener("online", retry);
    current.abort();
    retry();
  };
  return { stop, retry };
}

/**
 * Parse server-sent events.
 * @param {(event: {id: string, kind: string, data: any}) => void} onEvent
 * @returns {(text: string) => void}
 */
export function eventParser(onEvent) {
  let rest = "";
  return (text) => {
    const blocks = (rest + text.replaceAll("\r", "")).split("\n\n");
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const members = { id: "", event: "message", data: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(":");
        if (colon > 0) members[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
      }
      if (members.data && members.data !== "[DONE]") onEvent({ id: members.id, kind: members.event, data: JSON.parse(members.data) });
    }
  };
}
