/** Try the model: one conversation, vectors of texts, or an order of documents. Nothing is kept. */

import { MODEL, send } from "./api.js";
import { $, el, put, say, seconds } from "./dom.js";
import { eventParser } from "./stream.js";

let kind = "";
let messages = [];
let going = null; // what stops the answer that is being written

/** Show what fits the kind of the model that is ready; null hides it. */
export function show(loaded) {
  $("try").hidden = !loaded;
  const wanted = loaded ? (loaded.kind ?? "chat") : "";
  if (!loaded || wanted === kind) return;
  kind = wanted;
  messages = [];
  put($("talk"));
  for (const one of $("try").querySelectorAll("[data-kind]")) one.hidden = one.dataset.kind !== kind;
  $("prompt").placeholder = { chat: "Ask something", embedding: "One text a line", rerank: "One document a line" }[kind];
  say($("prompt-label"), { chat: "Message", embedding: "Texts", rerank: "Documents" }[kind]);
  say($("ask"), { chat: "Send", embedding: "Embed", rerank: "Rank" }[kind]);
}

const named = (body) => (MODEL === null ? body : { ...body, model: MODEL });
const about = (text) => say($("try-about"), text);

async function ask() {
  const text = $("prompt").value.trim();
  if (!text || going) return;
  going = new AbortController();
  $("stop").hidden = false;
  about("Waiting …");
  try {
    await { chat: talk, embedding: embed, rerank: rank }[kind](text);
  } catch (error) {
    const { name, message } = /** @type {any} */ (error);
    about(name === "AbortError" ? "Stopped." : message);
  }
  going = null;
  $("stop").hidden = true;
}

// -------------------------------------------------------------------------------------- chat

async function talk(text) {
  const system = $("system").value.trim();
  const temperature = Number($("temperature").value);
  messages.push({ role: "user", content: text });
  const [thinking, answer] = [el("p", { class: "thought", hidden: true }), el("p", { class: "answer" })];
  $("talk").append(el("p", { class: "asked" }, text), thinking, answer);
  $("prompt").value = "";
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    ...($("temperature").value.trim() && !Number.isNaN(temperature) ? { temperature } : {}),
  };
  const begun = performance.now();
  let first = 0;
  let count = 0;
  let [said, thoughts, frame] = ["", "", 0];
  let figures = null;
  const parse = eventParser(({ data }) => {
    if (data.error) throw new Error(data.error.message);
    figures = data.timings ?? figures;
    const { content, reasoning_content: thought } = data.choices?.[0]?.delta ?? {};
    if (!content && !thought) return;
    first ||= performance.now();
    count += 1;
    thoughts += thought ?? "";
    said += content ?? "";
    frame ||= requestAnimationFrame(draw);
  });
  const draw = () => {
    frame = 0;
    thinking.hidden = !thoughts;
    for (const [node, whole] of [[thinking, thoughts], [answer, said]]) node.append(whole.slice(node.textContent.length));
    $("talk").scrollTop = $("talk").scrollHeight;
    if (count) about(measured());
  };
  const measured = () => {
    const rate = figures?.predicted_per_second ?? (count - 1) / ((performance.now() - first) / 1000);
    const speed = count > 1 && `${rate >= 10 ? Math.round(rate) : rate.toFixed(1)} tokens/s`;
    return [speed, `first token after ${seconds((first - begun) / 1000)}`].filter(Boolean).join(" · ");
  };
  try {
    const reply = await send("/v1/chat/completions", named(body), going.signal);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      parse(value);
    }
    if (!count) about("The answer is empty.");
    say($("announce"), "The answer is complete.");
  } finally {
    cancelAnimationFrame(frame);
    draw();
    if (said) messages.push({ role: "assistant", content: said });
    else messages.pop(), answer.remove();
  }
}

// ---------------------------------------------------------------------- embeddings and rerank

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

async function timed(path, body) {
  const begun = performance.now();
  const found = await (await send(path, named(body), going.signal)).json();
  about(`${seconds((performance.now() - begun) / 1000)}${found.usage ? ` · ${found.usage.total_tokens} tokens` : ""}`);
  return found;
}

/** Vectors as they are, and how near each text is to the first. */
async function embed(text) {
  const texts = lines(text);
  const { data } = await timed("/v1/embeddings", { input: texts });
  const vectors = [...data].sort((a, b) => a.index - b.index).map((one) => one.embedding);
  const dot = (a, b) => a.reduce((sum, x, at) => sum + x * b[at], 0);
  const near = (v) => (dot(v, vectors[0]) / Math.sqrt(dot(v, v) * dot(vectors[0], vectors[0]))).toFixed(3);
  const rows = vectors.map((v, at) => [texts[at], near(v), `${v.length} numbers: ${v.slice(0, 4).map((x) => x.toFixed(3)).join(", ")} …`]);
  put($("talk"), table(["Text", "Similarity to the first", "Vector"], rows));
}

async function rank(text) {
  const documents = lines(text);
  const { results } = await timed("/v1/rerank", { query: $("query").value, documents });
  const rows = [...results].sort((a, b) => b.relevance_score - a.relevance_score).map((one) => [documents[one.index], one.relevance_score.toFixed(3)]);
  put($("talk"), table(["Document", "Score"], rows));
}

const table = (heads, rows) =>
  el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell))))));

// ------------------------------------------------------------------------------------ the box

$("try-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || kind !== "chat" || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => going?.abort());
$("clear").addEventListener("click", () => {
  going?.abort();
  messages = [];
  put($("talk"));
  about("");
});
