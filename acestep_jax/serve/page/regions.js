// Regions of a source, in seconds: how they move, the visible range, and their request fields. No DOM here.
//
// A region is {start, end}. It may start before 0, which extends the song at the start, or end after the source, which
// extends it at the end. There must be no gap between the source and a region.

export const SHORTEST = 0.1;
const GRID = 100; // steps per second, the resolution of the numbers

export const round = (seconds) => Math.round(seconds * GRID) / GRID;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Return the visible range of time: the source, the regions, and room to drag past both ends. */
export function view(regions, duration, longest = 600) {
  const room = Math.max(4, 0.12 * duration);
  const first = Math.min(0, ...regions.map((region) => region.start));
  const last = Math.max(duration, ...regions.map((region) => region.end));
  const start = first - room;
  const end = last + room;
  return { start, end: Math.max(end, start + 1), longest };
}

/** Convert a time to a fraction of the view, and back. */
export const toFraction = (seconds, shown) => (seconds - shown.start) / (shown.end - shown.start);
export const toSeconds = (fraction, shown) => shown.start + fraction * (shown.end - shown.start);

/** Return the region between two times in any order, within the limits of the source. */
export function between(one, other, duration) {
  return limited({ start: Math.min(one, other), end: Math.max(one, other) }, duration);
}

/** Return a region with its start or end moved to a time; it is at least SHORTEST long, and touches the source. */
export function withEdge(region, edge, seconds, duration) {
  if (edge === "start") {
    return { start: round(Math.min(seconds, region.end - SHORTEST, duration)), end: region.end };
  }
  return { start: region.start, end: round(Math.max(seconds, region.start + SHORTEST, 0)) };
}

/** Return a region moved by some seconds with the same length, as far as it still touches the source. */
export function moved(region, by, duration) {
  const step = clamp(by, -region.end, duration - region.start);
  return { start: round(region.start + step), end: round(region.end + step) };
}

/** Return a region that touches the source and is not empty. */
export function limited(region, duration) {
  const start = Math.min(region.start, duration);
  const end = Math.max(region.end, start + SHORTEST, 0);
  return { start: round(start), end: round(end) };
}

/** Return a new region: after the last one if there is room, else the whole source. */
export function another(regions, duration) {
  const last = Math.max(0, ...regions.map((region) => region.end));
  const length = Math.max(SHORTEST, Math.min(duration / 4, 8));
  if (last + SHORTEST > duration) return { start: 0, end: round(duration) };
  const start = regions.length ? last + Math.min(1, (duration - last) / 4) : duration * 0.25;
  return limited({ start, end: Math.min(start + length, duration) }, duration);
}

/** Return the request fields: numbers for one region, lists for several, no fields without regions. */
export function toFields(regions) {
  if (!regions.length) return {};
  const sorted = [...regions].sort((one, other) => one.start - other.start);
  const starts = sorted.map((region) => region.start);
  const ends = sorted.map((region) => region.end);
  return starts.length === 1
    ? { repainting_start: starts[0], repainting_end: ends[0] }
    : { repainting_start: starts, repainting_end: ends };
}

/** Return the regions in the fields of a request; a missing end, or -1, is the end of the source. */
export function fromFields(values, duration) {
  const list = (value) => (Array.isArray(value) ? value : value === undefined ? [] : [value]);
  const starts = list(values.repainting_start);
  const ends = list(values.repainting_end);
  const count = Math.max(starts.length, ends.length);
  return Array.from({ length: count }, (_, i) => {
    const start = Number(starts[i] ?? 0);
    const given = ends[i] ?? -1;
    return { start, end: given === -1 && start >= 0 ? duration : Number(given) };
  }).filter((region) => Number.isFinite(region.start) && Number.isFinite(region.end));
}

/** Return the time in a finished song at which its source begins. */
export function offsetOf(values, frameRate) {
  const first = Math.min(0, ...fromFields(values, Infinity).map((region) => region.start));
  return first < 0 ? Math.ceil(-first * frameRate - 1e-6) / frameRate : 0;
}
