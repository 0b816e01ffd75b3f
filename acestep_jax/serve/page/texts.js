// The prompt and the lyrics: buttons for sections, and token counts, an estimate first and then the server's count.
import * as api from "./api.js";
import { byId, el, settle } from "./dom.js";
import { guessTokens, TAGS, withTag } from "./lyrics.js";

const PAUSE = 400; // ms without a key press before the server is asked

/** Return a function that recounts the tokens, and shows them below the texts. */
export function createCounter(state, options) {
  function show(name, count, limit, guessed) {
    const place = byId(`${name}-tokens`);
    place.textContent = `${guessed ? "about " : ""}${count} of ${limit} tokens`;
    place.classList.toggle("over", count > limit);
    if (count > limit) place.textContent += ": the end is truncated";
  }

  const ask = settle(async () => {
    const asked = {
      prompt: state.values.prompt ?? "",
      lyrics: state.values.lyrics ?? "",
      vocal_language: state.values.vocal_language,
      model: state.model ?? undefined,
    };
    try {
      const counted = await api.tokens(asked);
      for (const [name, { tokens, limit }] of Object.entries(counted)) show(name, tokens, limit, false);
    } catch {
      // keep the estimate, marked as one; errors are shown when the song is requested
    }
  }, PAUSE);

  return () => {
    for (const name of ["prompt", "lyrics"])
      show(name, guessTokens(state.values[name] ?? ""), options.tokens[name], true);
    ask();
  };
}

/** Create the buttons that insert a section into the lyrics. */
export function connectTags() {
  const tags = byId("tags");
  for (const tag of TAGS) {
    tags.append(
      el(
        "button",
        { type: "button", class: "chip", aria: { label: `Insert [${tag}]` }, on: { click: () => insertTag(tag) } },
        tag,
      ),
    );
  }
  byId("instrumental").addEventListener("click", () => writeLyrics("[Instrumental]", 14));
}

function insertTag(tag) {
  const box = byId("lyrics");
  const { text, cursor } = withTag(box.value, box.selectionStart ?? box.value.length, tag);
  writeLyrics(text, cursor);
}

function writeLyrics(text, cursor) {
  const box = byId("lyrics");
  box.value = text;
  box.dispatchEvent(new Event("input"));
  box.focus();
  box.setSelectionRange(cursor, cursor);
}
