// The source: selecting it, its waveform, and its regions, with mouse, touch, keyboard and numbers.
import * as api from "./api.js";
import { announce, byId, el, icon } from "./dom.js";
import * as player from "./player.js";
import * as regions from "./regions.js";
import { clock } from "./time.js";
import * as waveform from "./waveform.js";

const STEPS = { ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1, PageDown: -5, PageUp: 5 };
const CLICK = 4; // pixels; a shorter drag is a click
const KEY = "source";

/**
 * Return the editor.
 *
 * It edits `state.regions`; `changed` is called after each change. The source is {kind, title, seconds, ...}, as in
 * request.js.
 */
export function createEditor(state, changed) {
  const stage = byId("stage");
  const canvas = byId("source-wave");
  const layer = byId("regions");
  const list = byId("region-list");
  let source = null;
  let peaks = [];
  let shown = null;
  let url = null;
  let withRegions = false;
  let loading = 0;

  const duration = () => source?.seconds ?? 0;

  /** Show another source, or none for null. */
  async function load(next) {
    const turn = ++loading;
    source = next;
    peaks = [];
    if (url) URL.revokeObjectURL(url);
    url = null;
    player.forget(KEY);
    byId("source-given").hidden = !next;
    byId("source-none").hidden = Boolean(next);
    if (!next) return draw();
    byId("source-title").textContent = next.title ?? "Source";
    byId("source-length").textContent = "";
    if (next.kind === "file") url = URL.createObjectURL(next.blob);
    try {
      const found = await measure(next);
      if (turn !== loading) return;
      peaks = found.peaks;
      source.seconds = found.seconds;
    } catch (error) {
      if (turn !== loading) return;
      byId("source-length").textContent = `no waveform: ${error.message}`;
    }
    if (source.seconds) byId("source-length").textContent = clock(source.seconds, true);
    draw();
    changed();
  }

  async function measure(next) {
    if (next.kind === "song") return api.peaks(next.id, next.index, 1200);
    let buffer;
    try {
      buffer = await waveform.decode(next.blob);
    } catch {
      throw new Error("this browser cannot decode the file, but the server may");
    }
    return { peaks: waveform.peaksOf(buffer, 1200), seconds: buffer.duration };
  }

  const soundUrl = () => (source.kind === "file" ? url : `/v1/songs/${source.id}/${source.index}.flac`);
  const track = () => ({ key: KEY, title: source.title ?? "Source", url: soundUrl(), seconds: duration() });

  function draw() {
    shown = regions.view(withRegions ? state.regions : [], duration());
    stage.hidden = !duration();
    byId("region-tools").hidden = !withRegions || !duration();
    layer.hidden = !withRegions;
    drawWave();
    if (!withRegions || !duration()) return layer.replaceChildren();
    layer.replaceChildren(...state.regions.map(regionBox));
    list.replaceChildren(...state.regions.map(regionRow));
    place();
  }

  function drawWave() {
    if (stage.hidden || !duration()) return;
    const from = regions.toFraction(0, shown);
    const to = regions.toFraction(duration(), shown);
    const at = player.now();
    const played = at.key === KEY ? at.seconds / duration() : 0;
    waveform.drawPeaks(canvas, peaks, { from, to, played, tone: "--source" });
    byId("source-extent").style.left = `${100 * from}%`;
    byId("source-extent").style.width = `${100 * (to - from)}%`;
  }

  /** Update the boxes and numbers of the regions without recreating them, so that a dragged handle keeps its focus. */
  function place() {
    state.regions.forEach((region, i) => {
      const box = layer.children[i];
      const left = regions.toFraction(region.start, shown);
      const right = regions.toFraction(region.end, shown);
      box.style.left = `${100 * left}%`;
      box.style.width = `${100 * (right - left)}%`;
      for (const edge of ["start", "end"]) {
        const handle = box.querySelector(`.${edge}`);
        handle.setAttribute("aria-valuenow", region[edge]);
        handle.setAttribute("aria-valuetext", `${region[edge].toFixed(2)} seconds`);
        handle.setAttribute("aria-valuemin", Math.floor(shown.start));
        handle.setAttribute("aria-valuemax", Math.ceil(shown.end));
        const input = list.children[i].querySelector(`.${edge}`);
        if (input !== document.activeElement) input.value = region[edge].toFixed(2);
      }
      list.children[i].querySelector("output").textContent = extensionText(region);
    });
  }

  function extensionText(region) {
    const words = [];
    if (region.start < 0) words.push(`adds ${(-region.start).toFixed(1)} s at the start`);
    if (region.end > duration()) words.push(`adds ${(region.end - duration()).toFixed(1)} s at the end`);
    return words.join(", ");
  }

  function regionBox(region, i) {
    const handle = (edge) =>
      el("span", {
        class: `handle ${edge}`,
        role: "slider",
        tabIndex: 0,
        data: { edge, testid: `handle-${i}-${edge}` },
        aria: { label: `${edge === "start" ? "Start" : "End"} of region ${i + 1}` },
        on: { keydown: (event) => onKey(event, i, edge) },
      });
    return el(
      "div",
      { class: "region", data: { index: i, testid: "region" } },
      handle("start"),
      el("b", { aria: { hidden: "true" } }, String(i + 1)),
      handle("end"),
    );
  }

  function regionRow(region, i) {
    const input = (edge) =>
      el("input", {
        type: "number",
        step: 0.01,
        class: edge,
        inputMode: "decimal",
        aria: { label: `${edge === "start" ? "Start" : "End"} of region ${i + 1} in seconds` },
        on: {
          change: (event) => {
            const seconds = event.target.valueAsNumber;
            if (Number.isFinite(seconds))
              state.regions[i] = regions.withEdge(state.regions[i], edge, seconds, duration());
            event.target.value = state.regions[i][edge].toFixed(2);
            draw();
            changed();
          },
        },
      });
    return el(
      "li",
      {},
      el("span", { class: "number", aria: { hidden: "true" } }, String(i + 1)),
      input("start"),
      el("span", { aria: { hidden: "true" } }, "to"),
      input("end"),
      el("span", { class: "unit" }, "s"),
      el(
        "button",
        {
          type: "button",
          class: "icon-button",
          aria: { label: `Remove region ${i + 1}` },
          on: { click: () => remove(i) },
        },
        icon("close"),
      ),
      el("output", { class: "hint" }),
    );
  }

  function remove(i) {
    state.regions.splice(i, 1);
    draw();
    changed();
    announce(`Region ${i + 1} removed, ${state.regions.length} left`);
    byId("add-region").focus();
  }

  function onKey(event, i, edge) {
    if (event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      return remove(i);
    }
    const region = state.regions[i];
    const ends = { Home: 0, End: duration() };
    let seconds;
    if (event.key in ends) seconds = ends[event.key];
    else if (event.key in STEPS) seconds = region[edge] + STEPS[event.key] * (event.shiftKey ? 10 : 1);
    else return;
    event.preventDefault();
    state.regions[i] = regions.withEdge(region, edge, seconds, duration());
    shown = regions.view(state.regions, duration());
    drawWave();
    place();
    changed();
  }

  // While a region is dragged, the view is fixed, so that nothing moves away from under the pointer.
  function onPress(event) {
    if (event.button !== 0 || !duration()) return;
    const box = layer.getBoundingClientRect();
    const timeAt = (x) => regions.toSeconds((x - box.left) / box.width, shown);
    const handle = event.target.closest(".handle");
    const inside = event.target.closest(".region");
    const began = timeAt(event.clientX);
    let index = inside ? Number(inside.dataset.index) : -1;
    const before = index >= 0 ? state.regions[index] : null;
    const isNew = !before && withRegions;
    let moved = false;
    stage.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle?.focus();

    const onMove = (next) => {
      if (!moved && Math.abs(next.clientX - event.clientX) < CLICK) return;
      const seconds = timeAt(next.clientX);
      if (!moved && isNew) {
        index = state.regions.push(regions.between(began, seconds, duration())) - 1;
        layer.append(regionBox(state.regions[index], index));
        list.append(regionRow(state.regions[index], index));
      }
      moved = true;
      if (index < 0) return;
      if (isNew) state.regions[index] = regions.between(began, seconds, duration());
      else if (handle)
        state.regions[index] = regions.withEdge(
          before,
          handle.dataset.edge,
          before[handle.dataset.edge] + seconds - began,
          duration(),
        );
      else state.regions[index] = regions.moved(before, seconds - began, duration());
      place();
    };
    const onEnd = () => {
      stage.removeEventListener("pointermove", onMove);
      stage.removeEventListener("pointerup", onEnd);
      stage.removeEventListener("pointercancel", onEnd);
      if (!moved) {
        if (!handle) player.playFrom(track(), Math.max(0, Math.min(began, duration())));
        return;
      }
      draw();
      changed();
      if (index >= 0) {
        const region = state.regions[index];
        announce(`Region ${index + 1} from ${region.start.toFixed(2)} to ${region.end.toFixed(2)} seconds`);
      }
    };
    stage.addEventListener("pointermove", onMove);
    stage.addEventListener("pointerup", onEnd);
    stage.addEventListener("pointercancel", onEnd);
  }

  stage.addEventListener("pointerdown", onPress);
  byId("add-region").addEventListener("click", () => {
    state.regions.push(regions.another(state.regions, duration()));
    draw();
    changed();
    layer.lastElementChild.querySelector(".handle").focus();
  });
  byId("source-play").addEventListener("click", () => source && player.toggle(track()));
  player.onChange(({ key }) => key === KEY && drawWave());
  new ResizeObserver(drawWave).observe(stage);

  return {
    load,
    /** Show or hide regions, and redraw everything. */
    update(regionsAreUsed) {
      withRegions = regionsAreUsed;
      draw();
    },
    /** Return whether there is a source, and its duration. */
    source: () => source,
    redraw: drawWave,
  };
}
