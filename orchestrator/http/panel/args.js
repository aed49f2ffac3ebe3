/** Arguments as typed, quoted as in a shell, and back. */

/**
 * @param {string} text
 * @returns {string[]}
 * @throws {Error} a quote is not closed
 */
export function split(text) {
  const args = [];
  let word = null;
  for (let at = 0; at < text.length; at += 1) {
    const c = text[at];
    if (/\s/.test(c)) {
      if (word !== null) args.push(word);
      word = null;
    } else if (c === "'" || c === '"') {
      word ??= "";
      for (at += 1; text[at] !== c; at += 1) {
        if (at >= text.length) throw new Error(`the quote ${c} is not closed`);
        if (c === '"' && text[at] === "\\" && /["\\]/.test(text[at + 1] ?? "")) at += 1;
        word += text[at];
      }
    } else {
      if (c === "\\" && at + 1 < text.length) at += 1;
      word = (word ?? "") + text[at];
    }
  }
  return word === null ? args : [...args, word];
}

/** @param {string[]} args */
export const join = (args) => args.map(quoted).join(" ");

const quoted = (arg) => (/^[\w@%+=:,./-]+$/.test(arg) ? arg : `'${arg.replaceAll("'", "'\\''")}'`);
