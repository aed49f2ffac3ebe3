/** The tail of what the servers print, followed as long as somebody wants it. */

import { $ } from "./dom.js";
import { follow } from "./stream.js";

const KEPT_CHARACTERS = 60000;
let stream = null;
let isNew = true;

/** Begin or end following, as the switch says. */
export function toggle() {
  stream?.stop();
  stream = null;
  if (!$("follow").checked) return;
  stream = follow("logs?follow=true&lines=200", {
    mayBeSilent: true,
    onOpen: () => (isNew = true), // the tail comes again
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
