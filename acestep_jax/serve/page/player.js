// One player for the whole page: a song, its source in sync, and the current line of the lyrics.
//
// A track is {key, title, url, seconds, lines, source}; source, if there is one, is {url, offset}, where `offset` is the
// time in the song at which its source begins. Both play at the same time, and one of them is muted. When they drift
// apart, the muted one is moved, so that corrections are inaudible.
import { announce, byId, icon } from "./dom.js";
import { lineAt } from "./lrc.js";
import * as storage from "./storage.js";
import { clock } from "./time.js";

const DRIFT = 0.04; // seconds
const PAUSE = 400; // ms between corrections, because seeking takes a moment

const main = byId("sound-a");
const other = byId("sound-b");
const position = byId("position");
const listeners = new Set();
let track = null;
let side = "A";
let corrected = 0;
let frame = null;

/** Call a function with {key, seconds, playing} whenever one of these changes. */
export const onChange = (listener) => listeners.add(listener);

/** Return the current state: {key, seconds, playing}. */
export const now = () => ({ key: track?.key ?? null, seconds: main.currentTime || 0, playing: !main.paused });

/** Play a track, or pause it if it is playing; start at `at` seconds if given. */
export function toggle(next, at = null) {
  if (track?.key !== next.key) {
    load(next);
  } else if (at === null && !main.paused) {
    main.pause();
    return;
  }
  if (at !== null) seek(at);
  start();
}

/** Play a track from a time, whether it is loaded or not. */
export const playFrom = (next, seconds) => toggle(next, seconds);

/** Unload a track that was removed. */
export function forget(prefix) {
  if (!track?.key.startsWith(prefix)) return;
  main.pause();
  other.pause();
  track = null;
  byId("transport").hidden = true;
  changed();
}

/** Set the lyrics of the loaded track. */
export function setLines(key, lines) {
  if (track?.key !== key) return;
  track.lines = lines;
  changed();
}

/** Switch to the song (A) or its source (B). */
export function setSide(name) {
  side = track?.source ? name : "A";
  main.muted = side === "B";
  other.muted = side === "A";
  byId("side-a").setAttribute("aria-pressed", side === "A");
  byId("side-b").setAttribute("aria-pressed", side === "B");
  correct(true);
}

function load(next) {
  main.pause();
  other.pause();
  track = next;
  main.src = next.url;
  if (next.source) other.src = next.source.url;
  else other.removeAttribute("src");
  byId("transport").hidden = false;
  byId("now-title").textContent = next.title;
  byId("sides").hidden = !next.source;
  setSide("A");
}

async function start() {
  try {
    await main.play();
  } catch (error) {
    if (error.name !== "AbortError") announce("This sound cannot be played."); // aborted: another track was selected
  }
}

function seek(seconds) {
  const most = Number.isFinite(main.duration) ? main.duration : (track?.seconds ?? Infinity);
  main.currentTime = Math.max(0, Math.min(seconds, most));
  correct(true);
  changed();
}

function correct(atOnce = false) {
  if (!track?.source || !other.src) return;
  const wanted = main.currentTime - track.source.offset;
  const inside = wanted >= 0 && !(wanted >= other.duration);
  if (!inside) {
    other.pause();
    return;
  }
  if (main.paused) {
    other.pause();
    if (Math.abs(other.currentTime - wanted) > DRIFT) other.currentTime = wanted;
    return;
  }
  if (other.paused) {
    other.currentTime = wanted;
    other.play().catch(() => {}); // retried at the next frame
    return;
  }
  const drift = other.currentTime - wanted;
  if (Math.abs(drift) < DRIFT || main.seeking || other.seeking) return;
  if (!atOnce && performance.now() - corrected < PAUSE) return;
  corrected = performance.now();
  if (side === "B" && !atOnce) main.currentTime = other.currentTime + track.source.offset;
  else other.currentTime = wanted;
}

function changed() {
  const seconds = main.currentTime || 0;
  const whole = Number.isFinite(main.duration) && main.duration > 0 ? main.duration : (track?.seconds ?? 0);
  byId("play").replaceChildren(icon(main.paused ? "play" : "pause"));
  byId("play").setAttribute("aria-label", main.paused ? "Play" : "Pause");
  byId("clock").textContent = `${clock(seconds)} / ${clock(whole)}`;
  position.max = whole || 1;
  position.value = seconds;
  position.setAttribute("aria-valuetext", `${clock(seconds)} of ${clock(whole)}`);
  showLine(seconds);
  for (const listener of listeners) listener({ key: track?.key ?? null, seconds, playing: !main.paused });
}

function showLine(seconds) {
  const lines = track?.lines ?? [];
  const box = byId("sung");
  box.hidden = !lines.length;
  if (!lines.length) return;
  const at = lineAt(lines, seconds);
  byId("sung-now").textContent = lines[at]?.text || "…";
  byId("sung-next").textContent = lines[at + 1]?.text ?? "";
}

function run() {
  frame = null;
  correct();
  changed();
  if (!main.paused && !main.ended) frame = requestAnimationFrame(run);
}

const TYPING = "input, textarea, select, button, summary, a, audio, [role=slider], [contenteditable]";

/** Connect the transport bar and the keys: space plays and pauses, b switches sides. */
export function connect() {
  for (const name of ["play", "pause", "ended", "seeked", "loadedmetadata"]) {
    main.addEventListener(name, () => (frame ??= requestAnimationFrame(run)));
  }
  main.addEventListener("timeupdate", changed); // also while the page is hidden and gets no animation frames
  main.addEventListener("error", () => track && announce("This sound cannot be loaded."));
  byId("play").addEventListener("click", () => track && toggle(track));
  position.addEventListener("input", () => seek(Number(position.value)));
  byId("side-a").addEventListener("click", () => setSide("A"));
  byId("side-b").addEventListener("click", () => setSide("B"));
  const volume = byId("volume");
  volume.value = storage.read("volume", 1);
  const setVolume = () => {
    main.volume = other.volume = Number(volume.value);
    storage.write("volume", Number(volume.value));
  };
  volume.addEventListener("input", setVolume);
  setVolume();
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest(TYPING) || !track) return;
    if (document.querySelector("dialog[open]")) return;
    if (event.key === " ") toggle(track);
    else if (event.key === "b" && track.source) setSide(side === "A" ? "B" : "A");
    else return;
    event.preventDefault();
  });
}
