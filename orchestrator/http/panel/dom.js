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
export const put = (node, ...children) => node.replaceChildren(...children.flat().filter(Boolean));

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
