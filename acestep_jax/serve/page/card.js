// A card in the history: one request, its progress, and its songs side by side.
import { announce, el, saveText } from "./dom.js";
import { createTake } from "./take.js";
import { progressText, when } from "./time.js";

const STATES = { queued: "waiting", running: "in progress", done: "", failed: "failed", cancelled: "cancelled" };

/**
 * Return a card: {element, record, heard, update, setProgress, played, redraw, text, title}.
 *
 * `actions` are {use, send, cancel, remove, setFavourite, modelOf}.
 */
export function createCard(record, options, actions) {
  const takes = new Map(); // index -> take
  const bar = el("progress", { max: 1, aria: { label: "Progress" } });
  const status = el("p", { class: "status" });
  const stop = el(
    "button",
    {
      type: "button",
      class: "quiet danger",
      data: { testid: "cancel" },
      on: { click: () => actions.cancel(card.record) },
    },
    "Cancel",
  );
  const progress = el("div", { class: "progress" }, bar, el("div", { class: "progress-line" }, status, stop));
  const problem = el("p", { class: "error", role: "status" });
  const songs = el("div", { class: "takes" });
  const state = el("span", { class: "state" });
  const notes = el("ul", { class: "notes" });
  const title = titleOf(record);
  const heading = el("h3", {}, title);
  const reuse = el("div", { class: "card-actions" });
  const element = el(
    "article",
    { class: "card", tabIndex: -1, data: { testid: "record", id: record.id }, aria: { label: title } },
    el("header", {}, heading, el("p", { class: "facts" }, el("span", {}, factsOf(record)), state)),
    progress,
    problem,
    songs,
    notes,
    reuse,
  );

  const button = (label, act, more = {}) =>
    el("button", { type: "button", class: "quiet", on: { click: act }, ...more }, label);
  reuse.append(
    button("Use these settings", () => actions.use(card.record, false), { data: { testid: "use" } }),
    button("Same seed", () => actions.use(card.record, true), {
      title: "The settings with the seed: reproduces the song, so that you can change one thing",
      data: { testid: "same-seed" },
    }),
    button("Export", () => saveText(`${record.id}.json`, JSON.stringify(exported(card.record), null, 2)), {
      title: "Save the request as a JSON file",
    }),
  );
  const removal = button("Remove", remove, { class: "quiet danger", data: { testid: "remove" } });
  reuse.append(removal);

  function remove() {
    if (removal.dataset.sure) return actions.remove(card.record);
    removal.dataset.sure = "yes";
    removal.textContent = "Remove for good?";
    announce("Press again to remove the songs for good");
    setTimeout(() => {
      delete removal.dataset.sure;
      removal.textContent = "Remove";
    }, 4000);
  }

  function update(next) {
    card.record = next;
    card.heard = performance.now();
    element.dataset.state = next.status;
    state.textContent = STATES[next.status] ?? next.status;
    state.hidden = !state.textContent;
    const open = next.status === "queued" || next.status === "running";
    progress.hidden = !open;
    removal.hidden = open;
    if (next.status === "queued") bar.removeAttribute("value");
    else bar.value = next.progress;
    setProgress(progressText(next));
    problem.textContent = next.error ?? "";
    problem.hidden = !next.error;
    notes.replaceChildren(...(next.notes ?? []).map((note) => el("li", {}, note)));
    notes.hidden = !next.notes?.length;
    for (const song of next.songs) {
      if (song.status !== "done" || takes.has(song.index)) continue;
      const take = createTake(next, song, title, options, actions);
      takes.set(song.index, take);
      const later = [...songs.children].find((other) => Number(other.dataset.index) > song.index);
      songs.insertBefore(take.element, later ?? null);
    }
    songs.dataset.count = takes.size;
  }

  function setProgress(text) {
    if (status.textContent !== text) status.textContent = text;
  }

  const card = {
    element,
    record,
    heard: 0,
    update,
    setProgress,
    played: (now) => takes.forEach((take) => take.played(now)),
    redraw: () => takes.forEach((take) => take.redraw()),
    text: () => `${title} ${record.request.lyrics ?? ""} ${record.model}`.toLowerCase(),
    title: () => title,
  };
  update(record);
  return card;
}

function titleOf(record) {
  const text = String(record.request.prompt ?? "")
    .trim()
    .split("\n")[0];
  return text.length > 90 ? `${text.slice(0, 88)}…` : text || "Untitled";
}

function factsOf(record) {
  const request = record.request;
  const facts = [request.task_type && request.task_type !== "text2music" ? request.task_type : null, record.model];
  if (request.bpm) facts.push(`${request.bpm} bpm`);
  if (request.keyscale) facts.push(request.keyscale);
  for (const [name, scale] of Object.entries(record.adapters ?? {})) facts.push(`${name} × ${scale}`);
  facts.push(when(record.created));
  return facts.filter(Boolean).join(" · ");
}

/** Return the request of a record, in a form that can be imported here and sent with curl. */
export function exported(record) {
  const body = { ...record.request, model: record.model };
  if (Object.keys(record.adapters ?? {}).length) body.adapters = record.adapters;
  if (record.songs.length > 1) body.variations = record.songs.length;
  if (record.format !== "flac") body.format = record.format;
  return body;
}
