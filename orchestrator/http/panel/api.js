/** Requests to the backend: the key, and problem documents as errors. */

const BASE = new URL("../api/inference/", import.meta.url);
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
 * @param {string} path below the API's prefix
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
export async function request(path, init = {}) {
  const key = sessionStorage.getItem(KEPT);
  const headers = { ...init.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(new URL(path, BASE), { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Failed({ status: 0, category: "unreachable", detail: "the backend does not answer" });
  }
  if (answer.ok) return answer;
  if (answer.status === 401) gate.onLocked();
  const problem = await answer.json().catch(() => null);
  throw new Failed(problem ?? { status: answer.status, category: "http_error", detail: `HTTP ${answer.status}` });
}

/** @param {string} path @returns {Promise<any>} */
export const get = async (path) => (await request(path)).json();

/** @param {string} path @param {object} body @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}
