/** The figures of the moment. */
export const speedOf = (name) => null;
export function start() {}
