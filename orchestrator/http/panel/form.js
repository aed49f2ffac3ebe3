/** The form: its request, the running settings, the variants of a model, and errors of fields. */

import { post } from "./api.js";
import { join, split } from "./args.js";
import { $, bytes, el, put, say } from "./dom.js";
import { FIELDS } from "./fields.js";

const SELECTS = ["gguf_variant", "cache_type_kv", "speculative_type"]; // written in index.html
const MODES = { off: "Off", default: "On" };

const form = $("form");
const extra = $("extra-text");
for (const one of FIELDS) (one.control === "check" ? $("checks") : $("plain")).append(drawn(one));

let isTouched = false;
let filled = ""; // what was put into the form last
let running = null; // extra arguments of the running server
let variants = [];
let listing = new AbortController();

/** The load request of the form. @throws {Error} the extra arguments cannot be parsed */
export function read() {
  const body = { model_path: $("model_path").value.trim() };
  for (const name of SELECTS) if ($(name).value.trim()) body[name] = $(name).value.trim();
  if ($("max_seq_length").value.trim()) body.max_seq_length = number($("max_seq_length").value);
  for (const { name, control, standard } of FIELDS) {
    const text = $(name).value.trim();
    if (control === "check" ? $(name).checked : text !== (standard ?? "")) body[name] = control === "check" || (control === "number" ? number(text) : text);
  }
  if ($("chat_template_override").value.trim()) body.chat_template_override = $("chat_template_override").value;
  if (form.elements.extra.value === "clear") body.llama_extra_args = [];
  if (form.elements.extra.value === "set") body.llama_extra_args = split(extra.value);
  return body;
}

/** A text as a number, if it is one; the backend refuses anything else. */
const number = (text) => (Number.isNaN(Number(text)) ? text.trim() : Number(text));

/** The control of a setting that index.html does not have. */
function drawn({ name, label, control, choices, blank, standard }) {
  if (control === "check") return el("label", { "data-field": name }, el("input", { type: "checkbox", id: name, name }), ` ${label}`);
  const words = [...(standard === null ? [[blank, ""]] : []), ...(choices ?? []).map((word) => [word, word])];
  const looks = { type: control === "secret" ? "password" : "text", inputMode: control === "number" ? "decimal" : "text" };
  const input = choices
    ? el("select", { id: name, name }, ...words.map(([text, value]) => el("option", { value }, text)))
    : el("input", { id: name, name, placeholder: blank, spellcheck: false, autocomplete: "off", ...looks });
  return el("div", { class: "field", "data-field": name }, el("label", { htmlFor: name }, label), input);
}

/** Put the running settings into the form, unless the user has changed it. */
export function fill(loaded, { force = false } = {}) {
  running = loaded?.llama_extra_args ?? null;
  $("match").hidden = !loaded;
  showExtra();
  const key = JSON.stringify(loaded);
  if (!loaded || (!force && (isTouched || key === filled))) return;
  isTouched = false;
  filled = key;
  form.reset();
  extra.value = "";
  $("model_path").value = loaded.model_path;
  $("max_seq_length").value = loaded.requested_context_length;
  choose($("gguf_variant"), loaded.gguf_variant ?? "");
  choose($("cache_type_kv"), loaded.cache_type_kv ?? "");
  choose($("speculative_type"), loaded.speculative_type, `${loaded.speculative_type} (manual)`);
  $("chat_template_override").value = loaded.chat_template_override ?? "";
  for (const { name, control, standard } of FIELDS.filter((one) => one.isShown)) {
    if (control === "check") $(name).checked = loaded[name] ?? false;
    else $(name).value = loaded[name] ?? standard ?? "";
  }
  showExtra();
  listVariants();
}

let refilled = "";

/** Put a request of before into the form; unless it is forced, only once and not over changes. */
export function refill(request, { force = false } = {}) {
  const key = JSON.stringify(request);
  if (!force && (isTouched || key === refilled)) return;
  refilled = key;
  const now = running;
  const { max_seq_length: context, speculative_type: mode } = request;
  fill({ ...request, requested_context_length: context ?? 0, speculative_type: mode ?? "off" }, { force: true });
  running = now;
  const args = request.llama_extra_args;
  if (args) {
    form.elements.extra.value = args.length ? "set" : "clear";
    extra.value = join(args);
  }
  $("match").hidden = !now;
  showExtra();
  isTouched = force;
  form.dispatchEvent(new Event("listed"));
}

/** Offer the values that the server binary accepts. */
export function offer(options) {
  for (const name of ["cache_type_kv", "speculative_type"]) {
    const kept = $(name).value;
    const first = name === "cache_type_kv" ? [el("option", { value: "" }, "Default")] : [];
    put($(name), first, options[name].map((one) => el("option", { value: one }, MODES[one] ?? one)));
    choose($(name), kept, `${kept} (manual)`);
  }
}

/** Select a value, and add it to the options if it is not one. */
function choose(select, wanted, label = wanted) {
  if (![...select.options].some((option) => option.value === wanted)) select.append(el("option", { value: wanted }, label));
  select.value = wanted;
}

/** The variant that a load would take; undefined before they are listed. */
export const chosenVariant = () =>
  variants.find((one) => ($("gguf_variant").value ? one.gguf_variant === $("gguf_variant").value : one.is_default));

/** List the variants of the model. */
export async function listVariants() {
  const [model_path, hint, select] = [$("model_path").value.trim(), $("gguf_variant-hint"), $("gguf_variant")];
  listing.abort();
  listing = new AbortController();
  variants = [];
  const kept = select.value;
  const shown = () => {
    const standard = variants.find((one) => one.is_default)?.gguf_variant;
    const rows = variants.filter((one) => one.gguf_variant).map((one) => el("option", { value: one.gguf_variant }, described(one)));
    put(select, el("option", { value: "" }, standard ? `Auto (${standard})` : "Auto"), rows);
    const isListed = variants.some((one) => one.gguf_variant === kept);
    if (isListed || (kept && !variants.length)) choose(select, kept);
  };
  if (!model_path) return say(hint, "");
  say(hint, "Listing variants …");
  hint.title = "";
  const body = { model_path };
  for (const name of ["revision", "hf_token"]) if ($(name).value.trim()) body[name] = $(name).value.trim();
  try {
    variants = (await post("variants", body, listing.signal)).variants;
    const [first] = variants;
    const isOne = variants.length === 1;
    say(hint, isOne ? `1 variant: ${bytes(first.size_bytes)}${first.is_cached ? ", on disk" : ""}.` : `${variants.length} variants.`);
  } catch (error) {
    if (/** @type {any} */ (error).name === "AbortError") return;
    say(hint, `Variants cannot be listed: ${/** @type {any} */ (error).message}`);
    hint.title = hint.textContent;
  }
  shown();
  form.dispatchEvent(new Event("listed"));
}

const described = (one) => `${one.gguf_variant} · ${bytes(one.size_bytes)}${one.is_cached ? " · on disk" : ""}`;

/** Explain the choice of extra arguments. */
function showExtra() {
  const choice = form.elements.extra.value;
  extra.hidden = choice !== "set";
  if (choice === "set" && !extra.value && running?.length) extra.value = join(running);
  const now = running?.length ? ` Now: ${join(running)}` : "";
  const hints = {
    inherit: `Those of the last successful load of this model.${now}`,
    clear: "No extra arguments.",
    set: "Exactly these, quoted as in a shell; blank = none.",
  };
  say($("extra-hint"), hints[choice]);
}

/** The element of a field, or null. */
export const fieldBox = (name) => form.querySelector(`[data-field="${CSS.escape(name ?? "")}"]`);
export const fieldLabel = (name) => fieldBox(name)?.querySelector("label, legend")?.textContent.trim();

/** Focus the control of a field. */
export function focusField(name) {
  const box = fieldBox(name);
  const fold = box?.closest("details");
  if (fold) fold.open = true;
  const isSet = name === "llama_extra_args" && !extra.hidden;
  (isSet ? extra : box?.querySelector("input:checked, input:not([type=radio]), select, textarea"))?.focus();
}

/** Show an error beside its field; null clears it. */
export function showFieldError(problem) {
  for (const old of form.querySelectorAll("[aria-invalid]")) {
    old.removeAttribute("aria-invalid");
    old.removeAttribute("aria-errormessage");
  }
  form.querySelector("#field-error")?.remove();
  const box = problem && fieldBox(problem.field);
  if (!box) return;
  box.append(el("p", { id: "field-error", class: "wrong" }, problem.detail));
  const control = extra.hidden || !box.contains(extra) ? box.querySelector("input, select, textarea") : extra;
  if (control.type === "radio") return;
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-errormessage", "field-error");
}

/** @param {() => void} onChange called when the request of the form has changed */
export function watch(onChange) {
  form.addEventListener("input", () => {
    isTouched = true;
    showExtra();
    onChange();
  });
  for (const name of ["model_path", "revision", "hf_token"]) $(name).addEventListener("change", () => listVariants());
  form.addEventListener("listed", onChange);
}
