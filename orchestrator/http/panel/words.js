/** The states of a model in plain words. */

const WORDS = { Idle: "not loaded", Killing: "stopping", Downloading: "downloading", Spawning: "starting", WaitingHealth: "loading", Healthy: "ready" };
const QUIET = new Set(["superseded", "cancelled"]);

export const isQuiet = (error) => !error || QUIET.has(error.category);
export const isMoving = (state) => state !== "Idle" && state !== "Healthy";

/** Why a model of a pool is not there: what its state does not say. */
export function plainly({ state, last_error: error, waiting = 0, leases = 0 }) {
  if (state === "Idle" && waiting) return "waits for memory";
  if (state === "Idle" && !isQuiet(error)) return "failed";
  if (state === "Healthy" && leases) return "answering";
  return WORDS[state] ?? state;
}

/** The colour of a state. */
export const tone = ({ state, last_error: error, waiting }) =>
  state === "Idle" && waiting ? "spawning" : state === "Idle" && !isQuiet(error) ? "failed" : state.toLowerCase();
