/** The state diagram, with the current state marked and the path of the load traced. */

import { request } from "./api.js";
import { $ } from "./dom.js";

const SETTLED = new Set(["Idle", "Healthy"]);
let path = new Set();
let generation = 0;
let current = "";

/** Fetch the diagram. Its style is diagram.css, because the policy forbids a style inside it. */
export async function draw() {
  const text = (await (await request("diagram.svg")).text()).replace(/<style>[^<]*<\/style>/, "");
  const svg = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  $("diagram").replaceChildren(document.importNode(svg, true));
  show();
}

/** A path begins with a load: from a state at rest, or with another generation. */
export function step(event) {
  if (SETTLED.has(event.source) || event.generation !== generation) path = new Set();
  generation = event.generation;
  path.add(`edge-${event.source}-${event.dest}`);
  light(event.dest);
}

/** @param {string} state */
export function light(state) {
  current = state;
  show();
}

function show() {
  for (const node of $("diagram").querySelectorAll(".state")) node.classList.toggle("current", node.id === `state-${current}`);
  for (const node of $("diagram").querySelectorAll(".edge")) node.classList.toggle("traced", path.has(node.id));
  const [box, node] = [$("diagram"), $("diagram").querySelector(".current")];
  if (!node || box.scrollWidth <= box.clientWidth) return;
  const [inside, around] = [node.getBoundingClientRect(), box.getBoundingClientRect()];
  box.scrollLeft += inside.left + inside.width / 2 - around.left - around.width / 2;
}
