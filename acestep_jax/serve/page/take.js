// One song of a card: its player, its pictures, its plan, and its actions.
import * as api from "./api.js";
import { el, icon, toast } from "./dom.js";
import * as lrc from "./lrc.js";
import * as player from "./player.js";
import { offsetOf } from "./regions.js";
import { reasonAgainst } from "./request.js";
import * as storage from "./storage.js";
import { clock } from "./time.js";
import * as waveform from "./waveform.js";

const COLUMNS = 420;
const LEVELS = [480, 128]; // columns and rows of a spectrogram
const PLAN_WORDS = [
  "caption",
  "lyrics",
  "audio_duration",
  "bpm",
  "keyscale",
  "timesignature",
  "vocal_language",
  "score",
];

// Cards outside of the screen load no waveform, so that a long history opens as fast as a short one.
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries)
      if (entry.isIntersecting) (seen.unobserve(entry.target), entry.target.dispatchEvent(new Event("seen")));
  },
  { rootMargin: "300px" },
);

/** Return one song of a card: {element, played, redraw}. */
export function createTake(record, song, title, options, actions) {
  const key = `${record.id}/${song.index}`;
  const name = record.songs.length > 1 ? `${title}, ${song.index + 1} of ${record.songs.length}` : title;
  const model = actions.modelOf(record.model);
  const time = el("span", { class: "time" }, clock(song.seconds));
  const play = el(
    "button",
    { type: "button", class: "play", data: { testid: "play" }, aria: { label: `Play ${name}` } },
    icon("play"),
  );
  const canvas = el("canvas", {
    class: "wave",
    role: "img",
    aria: { label: `Waveform of ${name}` },
    data: { testid: "wave" },
  });
  const spectrum = el("canvas", {
    class: "spectrum",
    hidden: true,
    role: "img",
    aria: { label: `Spectrogram of ${name}` },
    data: { testid: "spectrum" },
  });
  let peaks = null;
  let at = 0;

  const source = record.uploads?.includes("src_audio")
    ? { url: api.uploadPath(record.id, "src_audio"), offset: offsetOf(record.request, model?.frame_rate ?? 25) }
    : null;
  const track = {
    key,
    title: name,
    url: song.audio,
    seconds: song.seconds,
    source,
    lines: lrc.parse(storage.read(`lrc.${key}`, "")),
  };

  function setLines(text) {
    track.lines = lrc.parse(text);
    player.setLines(key, track.lines);
    return track.lines.length;
  }

  const small = (label, act, more = {}) =>
    el("button", { type: "button", class: "quiet small", on: { click: act }, ...more }, label);
  const sendTo = (task, label) => {
    const reason = reasonAgainst(task, options.tasks[task], model);
    const send = () =>
      actions.send({ kind: "song", id: record.id, index: song.index, title: name, seconds: song.seconds }, task);
    return small(label, reason ? undefined : send, {
      disabled: Boolean(reason),
      title: reason ?? undefined,
      data: { testid: `to-${task}` },
    });
  };
  const star = el(
    "button",
    { type: "button", class: "icon-button star", aria: { label: `Favourite: ${name}`, pressed: String(song.favourite) } },
    icon("star"),
  );
  star.addEventListener("click", async () => {
    const yes = star.getAttribute("aria-pressed") !== "true";
    star.setAttribute("aria-pressed", yes);
    try {
      await actions.setFavourite(record.id, song.index, yes);
    } catch (error) {
      star.setAttribute("aria-pressed", !yes);
      toast(`It could not be marked: ${error.message}`);
    }
  });
  const picture = el(
    "button",
    {
      type: "button",
      class: "icon-button",
      title: "Spectrogram",
      data: { testid: "spectrogram" },
      aria: { label: `Spectrogram of ${name}`, expanded: "false" },
    },
    icon("spectrum"),
  );
  picture.addEventListener("click", toggleSpectrum);

  const words = el("input", {
    type: "file",
    accept: ".lrc,text/plain",
    class: "sr-only",
    tabIndex: -1,
    aria: { label: `LRC file for ${name}` },
  });
  words.addEventListener("change", async () => {
    const text = await words.files[0]?.text();
    if (text === undefined) return;
    const count = setLines(text);
    if (count) storage.write(`lrc.${key}`, text);
    toast(
      count
        ? `${count} lines are shown while it plays.`
        : "This file has no timed lines, such as [00:12.00]words.",
    );
  });

  const formats = options.formats.map((form) =>
    el(
      "a",
      {
        href: formatPath(song.audio, record.format, form),
        download: `${fileName(title)}-${song.seed}.${form.replace(/\d+$/, "")}`,
        data: { format: form },
      },
      form.toUpperCase(),
    ),
  );
  const downloads = el(
    "details",
    { class: "menu" },
    el(
      "summary",
      { title: "Download", aria: { label: `Download ${name}` }, data: { testid: "download" } },
      icon("download"),
    ),
    el("div", { class: "menu-list" }, formats),
  );
  downloads.addEventListener("keydown", (event) => {
    if (event.key === "Escape") ((downloads.open = false), downloads.querySelector("summary").focus());
  });
  downloads.addEventListener("focusout", (event) => {
    if (!downloads.contains(event.relatedTarget)) downloads.open = false;
  });

  const plan = song.plan && planBox(song.plan, () => actions.usePlan(record, song));
  const element = el(
    "section",
    { class: "take", data: { testid: "song", index: song.index, state: song.status }, aria: { label: name } },
    el("div", { class: "take-main" }, play, el("div", { class: "pictures" }, canvas, spectrum), time),
    el(
      "div",
      { class: "take-actions" },
      el("span", { class: "seed", title: "Seed" }, `seed ${song.seed}`),
      sendTo("repaint", "Repaint"),
      sendTo("cover", "Cover"),
      small(
        "Reference",
        () =>
          actions.send({ kind: "song", id: record.id, index: song.index, title: name, seconds: song.seconds }, null),
        { title: "Use its timbre", data: { testid: "to-reference" } },
      ),
      small("LRC", () => words.click(), { title: "Show the lyrics of an LRC file while it plays" }),
      words,
      el("span", { class: "icons" }, picture, star, downloads),
    ),
    plan,
  );

  play.addEventListener("click", () => player.toggle(track));
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    player.playFrom(track, ((event.clientX - box.left) / box.width) * song.seconds);
  });
  element.addEventListener("seen", async () => {
    if (song.lrc && !track.lines.length) api.text(song.lrc).then(setLines, () => {}); // without them, it plays anyway
    try {
      peaks = (await api.peaks(record.id, song.index, COLUMNS)).peaks;
      redraw();
    } catch {
      // a song without its picture can still be played
    }
  });
  seen.observe(element);
  new ResizeObserver(() => redraw()).observe(canvas);

  async function toggleSpectrum() {
    const open = spectrum.hidden;
    picture.setAttribute("aria-expanded", open);
    spectrum.hidden = !open;
    if (!open || spectrum.dataset.state) return;
    spectrum.dataset.state = "computing";
    try {
      waveform.drawLevels(spectrum, await waveform.levelsOf(await api.blob(song.audio), ...LEVELS), ...LEVELS);
      spectrum.dataset.state = "done";
    } catch (error) {
      delete spectrum.dataset.state;
      spectrum.hidden = true;
      toast(`No spectrogram: ${error.message}`);
    }
  }

  function redraw() {
    if (peaks && canvas.clientWidth) waveform.drawPeaks(canvas, peaks, { played: at / song.seconds });
  }

  function played(now) {
    const mine = now.key === key;
    const playing = mine && now.playing;
    if (play.dataset.playing !== String(playing)) {
      play.dataset.playing = playing;
      play.setAttribute("aria-label", `${playing ? "Pause" : "Play"} ${name}`);
      play.replaceChildren(icon(playing ? "pause" : "play"));
    }
    const seconds = mine ? now.seconds : 0;
    if (Math.abs(seconds - at) < 0.05 && seconds !== 0) return;
    if (seconds === at) return;
    at = seconds;
    time.textContent = mine ? `${clock(at)} / ${clock(song.seconds)}` : clock(song.seconds);
    redraw();
  }

  return { element, played, redraw };
}

/** Return the plan of a song, collapsed. */
function planBox(plan, edit) {
  const shown = Object.entries(plan).filter(
    ([name, value]) => PLAN_WORDS.includes(name) && value !== null && value !== "",
  );
  const rows = shown.flatMap(([name, value]) => [el("dt", {}, name.replace("_", " ")), el("dd", {}, String(value))]);
  return el(
    "details",
    { class: "plan", data: { testid: "plan" } },
    el("summary", {}, "Plan"),
    el("dl", {}, rows),
    el("button", { type: "button", class: "quiet small", on: { click: edit } }, "Edit this plan"),
  );
}

// The link of another format. A signature is for one path, so without the session cookie only its own format works.
function formatPath(link, own, form) {
  const [path] = link.split("?");
  return form === own ? link : `${path.slice(0, path.length - own.length)}${form}`;
}

const fileName = (title) =>
  title
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 50) || "song";
