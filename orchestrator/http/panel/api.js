/** Requests to the backend: the key, and problem documents as errors. */

const ROOT = new URL("../", import.meta.url);

/** The model of a pool that this page is about; null on the page of a single slot, and of all. */
export const MODEL = location.pathname.endsWith("/model") ? new URLSearchParams(location.search).get("name") : null;
const BASE = new URL(MODEL === null ? "api/inference/" : `api/models/${encodeURIComponent(MODEL)}/`, ROOT);

/** The address for clients. */
export const V1 = new URL("v1", ROOT).href;
const KEPT = "llama-orchestrator key"; // in sessionStorage, which ends with the tab

/** A problem document (RFC 9457), or no answer at all. */
export class Failed extends Error {
  /** @param {Record<string, any>} problem */
  constructor(problem) {
    super(problem.detail);
    this.problem = problem;
  }
}

/** Called when the backend refuses a request without a valid key. */
export const gate = { onLocked: () => {} };

export const keepKey = (key) => sessionStorage.setItem(KEPT, key);
export const hasKey = () => sessionStorage.getItem(KEPT) !== null;
export const dropKey = () => sessionStorage.removeItem(KEPT);

/**
 * @param {string} path below the prefix of the slot or model; one with a slash in front: of the service
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
export async function request(path, init = {}) {
  const key = sessionStorage.getItem(KEPT);
  const headers = { ...init.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path.startsWith("/") ? new URL(path.slice(1), ROOT) : new URL(path, BASE), { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Failed({ status: 0, category: "unreachable", detail: "the backend does not answer" });
  }
  if (answer.ok) return answer;
  // the refusal of a request from before another key was typed says nothing about that key
  if (answer.status === 401 && key === sessionStorage.getItem(KEPT)) gate.onLocked();
  const body = await answer.json().catch(() => null);
  const { code: category, message: detail } = body?.error ?? {}; // below /v1
  const problem = detail ? { status: answer.status, category, detail } : body;
  throw new Failed(problem ?? { status: answer.status, category: "http_error", detail: `HTTP ${answer.status}` });
}

/** @param {string} path @returns {Promise<any>} */
export const get = async (path) => (await request(path)).json();

/** @param {string} path @param {object} body @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** POST a body, and return the answer to be read. */
export function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}
