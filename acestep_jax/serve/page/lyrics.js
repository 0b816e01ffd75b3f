// The text of lyrics: sections in brackets, and an estimate of its tokens until the server counts them. No DOM here.

export const TAGS = ["Intro", "Verse", "Pre-Chorus", "Chorus", "Bridge", "Instrumental", "Guitar Solo", "Outro"];

/**
 * Return a text with a tag inserted on its own line, and the new position of the cursor.
 *
 * If text is selected, the tag is inserted before it, so that nothing is lost.
 */
export function withTag(text, place, tag) {
  const before = text.slice(0, place).replace(/[ \t]+$/, "");
  const after = text.slice(place).replace(/^[ \t]+/, "");
  const open = before === "" || before.endsWith("\n\n") ? "" : before.endsWith("\n") ? "\n" : "\n\n";
  const head = `${before}${open}[${tag}]\n`;
  const rest = after.startsWith("\n") ? after.slice(1) : after;
  return { text: head + rest, cursor: head.length };
}

/** Estimate the tokens of a text: a third of its Latin letters, and one for each character of other scripts. */
export function guessTokens(text) {
  const wide = (text.match(/[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]/g) || []).length;
  return Math.ceil((text.length - wide) / 3.2) + wide;
}
