// The finished and unfinished songs, newest first, and the actions on them.
import * as api from "./api.js";
import { createCard } from "./card.js";
import { announce, byId, toast } from "./dom.js";
import { follower, oldest, vanished } from "./order.js";
import * as player from "./player.js";
import { progressText } from "./time.js";

const FINAL = ["done", "failed", "cancelled"];
const PAGE = 20;
const POLL = 3000; // ms, for records that are not watched, because browsers allow only six connections per server
const RETRY = 4000;

/**
 * Return the history: {start, add}.
 *
 * `actions` are the actions of a card's buttons, see card.js; `reachable(yes)` gets whether the server responds.
 */
export function createHistory(options, actions, reachable) {
  const list = byId("songs");
  const cards = new Map(); // id -> card, unordered; the page has the order
  const removed = new Set(); // ids, which a response in flight may still contain
  let stopWatching = null;
  let watched = null;

  const own = {
    ...actions,
    async setFavourite(id, index, yes) {
      await api.favourite(id, index, yes);
      const song = cards.get(id)?.record.songs[index];
      if (song) song.favourite = yes;
      filter();
    },
    async cancel(record) {
      await attempt(async () => show(await api.cancel(record.id)));
    },
    async remove(record) {
      await attempt(async () => {
        await api.remove(record.id);
        removed.add(record.id);
        drop(record.id);
        toast("Removed.");
      });
    },
  };

  async function attempt(act) {
    try {
      await act();
    } catch (error) {
      toast(`This failed: ${error.message}`);
    }
  }

  function drop(id) {
    player.forget(id);
    const card = cards.get(id);
    if (!card) return;
    const hadFocus = card.element.contains(document.activeElement);
    const next = card.element.nextElementSibling ?? card.element.previousElementSibling ?? byId("songs-title");
    card.element.remove();
    cards.delete(id);
    filter();
    if (hadFocus) next.focus();
  }

  /** Show the current state of a record, in a new card or its existing one. */
  function show(record) {
    let card = cards.get(record.id);
    const earlier = card?.record.status;
    if (card) card.update(record);
    else {
      card = createCard(record, options, own);
      const next = follower(record, records());
      list.insertBefore(card.element, next ? cards.get(next.id).element : null);
      cards.set(record.id, card);
      filter();
    }
    if (earlier && earlier !== record.status) tell(record, card);
    watch();
    return card;
  }

  function records() {
    return [...cards.values()].map((card) => card.record);
  }

  function tell(record, card) {
    const words = { running: "is being made", done: "is ready", failed: "failed", cancelled: "was cancelled" };
    announce(`${card.title()} ${words[record.status] ?? record.status}`);
    if (record.status === "done") document.title = document.hidden ? `✓ ${card.title()}` : "acestep-jax";
  }

  /** Watch the record in progress, or the next one; the others are polled every few seconds. */
  function watch() {
    if (document.hidden) return;
    const open = records().filter((record) => !FINAL.includes(record.status));
    const next =
      open.find((record) => record.status === "running") ?? open.sort((one, other) => one.created - other.created)[0];
    if (watched === (next?.id ?? null)) return;
    stopWatching?.();
    stopWatching = null;
    watched = next?.id ?? null;
    if (!next) return;
    stopWatching = api.watch(next.id, show, () => {
      if (watched === next.id) watched = null;
      setTimeout(watch, 500);
    });
  }

  async function poll() {
    let pause = POLL;
    try {
      const open = records().some((record) => !FINAL.includes(record.status));
      if (!document.hidden && (open || lost)) await refresh();
      answered();
    } catch (error) {
      if (error instanceof api.Unreachable) failed();
      pause = RETRY;
    }
    setTimeout(poll, pause);
  }

  let lost = false;
  function failed() {
    if (!lost) announce("The server does not respond. The page keeps trying.");
    lost = true;
    reachable(false);
  }
  function answered() {
    if (lost) announce("The server responds again.");
    lost = false;
    reachable(true);
  }

  /** Fetch the newest records, including those of other pages and clients. */
  async function refresh() {
    const asked = records();
    const { songs } = await api.history(PAGE);
    for (const record of songs) if (!removed.has(record.id)) show(record);
    for (const id of vanished(asked, songs, PAGE)) drop(id);
    return songs;
  }

  async function more() {
    const page = await olderThan(oldest(records()));
    for (const record of page.songs) if (!removed.has(record.id)) show(record);
    byId("older").hidden = page.before === null;
    filter();
  }

  /** Return the next page. Records that other clients have removed cannot mark its start. */
  async function olderThan(mark) {
    try {
      return await api.history(PAGE, mark?.id);
    } catch (error) {
      if (!mark || error.status !== 400) throw error;
      drop(mark.id);
      return olderThan(oldest(records()));
    }
  }

  function filter() {
    const words = byId("search").value.trim().toLowerCase();
    const starred = byId("only-favourites").checked;
    let visible = 0;
    for (const card of cards.values()) {
      const fits =
        card.text().includes(words) &&
        (!starred || card.record.songs.some((song) => song.favourite));
      card.element.hidden = !fits;
      visible += fits;
    }
    byId("empty").hidden = cards.size > 0;
    byId("nothing-found").hidden = cards.size === 0 || visible > 0;
    byId("songs-tools").hidden = cards.size === 0;
  }

  /** Count down between updates from the server. */
  function tick() {
    for (const card of cards.values()) {
      if (!FINAL.includes(card.record.status))
        card.setProgress(progressText(card.record, (performance.now() - card.heard) / 1000));
    }
  }

  byId("search").addEventListener("input", filter);
  byId("only-favourites").addEventListener("change", filter);
  byId("older").addEventListener("click", () => attempt(more));
  player.onChange((now) => {
    for (const card of cards.values()) card.played(now);
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      stopWatching?.();
      stopWatching = watched = null;
    } else {
      document.title = "acestep-jax";
      refresh().then(answered, () => {});
    }
  });

  return {
    /** Show the newest page, and keep it up to date. */
    async start() {
      try {
        await more();
        answered();
      } finally {
        setInterval(tick, 1000);
        setTimeout(poll, POLL);
        filter();
      }
    },
    /** Show a record that was just requested. */
    add(record) {
      const card = show(record);
      card.element.scrollIntoView({ block: "nearest" });
    },
    redraw() {
      for (const card of cards.values()) card.redraw();
    },
  };
}
