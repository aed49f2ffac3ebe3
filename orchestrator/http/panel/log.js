/** The last lines of the servers' output, followed while the switch is on. */

import { $ } from "./dom.js";
import { follow } from "./stream.js";

const KEPT_CHARACTERS = 60000;
let stream = null;
let isNew = true;

/** Begin or stop following, after the switch was changed. */
export function toggle() {
  stream?.stop();
  stream = null;
  if (!$("follow").checked) return;
  stream = follow("logs?follow=true&lines=200", {
    mayBeSilent: true,
    onOpen: () => (isNew = true), // the last lines are sent again
    onText: add,
    onLost: () => {},
  });
}

export const retry = () => stream?.retry();

function add(text) {
  const log = $("log");
  const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  const all = ((isNew ? "" : log.textContent) + text).slice(-KEPT_CHARACTERS);
  isNew = false;
  log.textContent = all;
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}
