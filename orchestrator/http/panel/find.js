/** Find a model: what is on this machine, and the variants of a Hub repo, with what fits. */

import { get, post } from "./api.js";
import { $, ago, bytes, el, put, say } from "./dom.js";

const REPO = /^[\w.-]+\/[\w.-]+$/;

/**
 * @param {string} prefix of the two routes
 * @param {(model: string) => void} onPick called with what loads the model
 */
export function finder(prefix, onPick) {
  const search = el("input", { id: "search", type: "search", spellcheck: false, autocapitalize: "off", autocomplete: "off" });
  const look = el("button", { type: "button" }, "Look up");
  const [hint, list, found] = [el("p", { class: "hint", role: "status" }), el("ul", { class: "found" }), el("ul", { class: "found" })];
  const room = { free_bytes: null, free_mib: {} };
  let models = [];

  const row = (name, about, wrong, pick) =>
    el("li", {}, el("button", { type: "button", class: "quiet pick", onclick: () => onPick(pick) }, name), el("span", { class: "soft" }, about, wrong && el("strong", { class: "bad" }, ` · ${wrong}`)));

  function showDisk() {
    const words = search.value.trim().toLowerCase();
    const some = models.filter((one) => one.model_path.toLowerCase().includes(words));
    put(list, some.slice(0, 50).map((one) => {
      const place = one.where === "cache" ? "Hub cache" : "folder";
      return row(one.model_path, `${bytes(one.size_bytes)} · ${place} · used ${ago(one.last_used_at)}`, tooLarge(one.size_bytes), one.model_path);
    }));
    const free = Object.entries(room.free_mib).map(([device, n]) => `${device} ${bytes(n * 2 ** 20)}`);
    const disk = room.free_bytes === null ? [] : [`disk ${bytes(room.free_bytes)}`];
    const none = words ? "None of that name on this machine" : "No model on this machine";
    say(hint, `${some.length ? `${some.length} on this machine` : none}. Free: ${[...free, ...disk].join(", ")}.`);
  }

  /** What free memory is too little for; a load that stops another model has more. */
  const tooLarge = (size) => {
    const free = Object.values(room.free_mib).reduce((sum, n) => sum + n, 0) * 2 ** 20;
    return free && size > free ? "more than the free memory" : "";
  };

  async function lookUp() {
    const repo = search.value.trim();
    put(found);
    if (!REPO.test(repo)) return say(hint, "The Hub is asked by the name of a repo: owner/name.");
    say(hint, `Asking for ${repo} …`);
    try {
      const { variants } = await post(`${prefix}variants`, { model_path: repo });
      put(found, variants.map((one) => {
        const label = one.gguf_variant ?? "the only file";
        const noDisk = !one.is_cached && room.free_bytes !== null && one.size_bytes > room.free_bytes && "more than the free disk";
        const about = [bytes(one.size_bytes), one.is_cached ? "on disk" : "to be downloaded", one.is_default && "picked if you name none"].filter(Boolean).join(" · ");
        return row(label, about, noDisk || tooLarge(one.size_bytes), one.gguf_variant ? `${repo}:${one.gguf_variant}` : repo);
      }));
      say(hint, `${repo} has ${variants.length === 1 ? "one variant" : `${variants.length} variants`}.`);
    } catch (error) {
      say(hint, /** @type {any} */ (error).message);
    }
  }

  search.addEventListener("input", () => {
    put(found);
    showDisk();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // it would submit the form around it
    lookUp();
  });
  look.onclick = lookUp;
  const label = el("label", { htmlFor: "search" }, "Name on this machine, or a Hub repo (owner/name)");
  const box = el("details", { class: "find" }, el("summary", {}, "Find a model"), label, el("div", { class: "searching" }, search, look), hint, found, list);
  box.addEventListener("toggle", async () => {
    if (!box.open) return;
    say(hint, "Looking …");
    try {
      const answer = await get(`${prefix}on-disk`);
      models = answer.models;
      Object.assign(room, answer);
      showDisk();
    } catch (error) {
      say(hint, /** @type {any} */ (error).message);
    }
  });
  return box;
}
