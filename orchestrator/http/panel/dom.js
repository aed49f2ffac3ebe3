/** Helpers for the document, and the format of values. */

/** @param {string} id @returns {any} */
export const $ = (id) => document.getElementById(id);

/**
 * Make an element. Data is inserted as text, never as markup.
 * @param {string} tag
 * @param {Record<string, any>} [props] properties; `class`, `role` and names with a "-" are attributes
 * @param {...(Node|string|null|undefined|false)} children
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class" || name.includes("-") || name === "role") node.setAttribute(name, value);
    else /** @type {any} */ (node)[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Replace the children of a node. */
export const put = (node, ...children) => node.replaceChildren(...children.flat(2).filter(Boolean));

/** Set text only when it has changed, so that live regions are not read again. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** @param {number | null} n bytes; null where a mirror of the Hub lists none */
export function bytes(n) {
  if (n === null) return "unknown size";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let at = 0;
  for (; n >= 1000 && at < units.length - 1; at += 1) n /= 1000;
  return `${n < 10 && at ? n.toFixed(1) : Math.round(n)} ${units[at]}`;
}

/** @param {number} s seconds */
export function seconds(s) {
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 9.95 && !Number.isInteger(s)) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

/** The time of day, such as 14:03:07. @param {number} ms since 1970 */
export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

/** How long ago that was. @param {number} s Unix seconds */
export function ago(s) {
  const past = Math.max(0, Date.now() / 1000 - s);
  if (past < 5) return "now";
  if (past < 86400) return `${seconds(past < 3600 && past > 60 ? 60 * Math.floor(past / 60) : Math.floor(past)).replace(/ 0 s$/, "")} ago`;
  return `${Math.floor(past / 86400)} d ago`;
}

/** Memory. @param {number} n MiB */
export const mib = (n) => (n < 1024 ? `${n} MiB` : `${(n / 1024).toFixed(n < 10240 ? 1 : 0)} GiB`);

/** "1 request", "2 requests". */
export const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** A button that copies a text, and says so. */
export function copier(text, label = "Copy") {
  const button = el("button", { type: "button", class: "quiet", "aria-label": `${label} ${text}` }, label);
  button.onclick = async () => {
    await copy(text);
    say($("announce"), "Copied.");
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  };
  return button;
}

/** Copy a text; a page that is not served from localhost or by HTTPS has no clipboard of its own. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text, class: "unseen" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A model with its variant; of a path only its last part. */
export function named({ model_path: path, gguf_variant: variant }, whole = false) {
  const shown = path.startsWith("/") && !whole ? path.replace(/^.*\/(?=[^/])/, "…/") : path;
  return variant ? `${shown} · ${variant}` : shown;
}

/** A value of a setting, for display. */
export function value(of) {
  if (of === null || of === undefined || of === "") return "default";
  if (Array.isArray(of)) return of.length ? of.map((one) => (typeof one === "object" ? JSON.stringify(one) : one)).join(" ") : "none";
  return typeof of === "object" ? JSON.stringify(of) : String(of);
}
