// The text of lyrics: sections in brackets, and a guess at tokens until the server has counted them. No DOM here.

export const TAGS = ["Intro", "Verse", "Pre-Chorus", "Chorus", "Bridge", "Instrumental", "Guitar Solo", "Outro"];

/**
 * Return a text with a tag on a line of its own at a place, and where the cursor goes.
 *
 * A tag that replaces a selection is put before it: nothing that was written is lost.
 */
export function withTag(text, place, tag) {
  const before = text.slice(0, place).replace(/[ \t]+$/, "");
  const after = text.slice(place).replace(/^[ \t]+/, "");
  const open = before === "" || before.endsWith("\n\n") ? "" : before.endsWith("\n") ? "\n" : "\n\n";
  const head = `${before}${open}[${tag}]\n`;
  const rest = after.startsWith("\n") ? after.slice(1) : after;
  return { text: head + rest, cursor: head.length };
}

/** Return about how many tokens a text is: a third of its letters, and one for each sign of other scripts. */
export function guessTokens(text) {
  const wide = (text.match(/[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]/g) || []).length;
  return Math.ceil((text.length - wide) / 3.2) + wide;
}
