// Timed lyrics, as in LRC files: [mm:ss.xx]text. No DOM here.

const STAMP = /\[(\d{1,3}):(\d{1,2}(?:[.:]\d{1,3})?)\]/g;
const TAG = /^\[[^\]]*\]$/;
const OFFSET = /^\[offset:\s*([+-]?\d+)\s*\]\s*$/i;

/**
 * Return the lines of an LRC text, [{time, text}] sorted by time, without untimed lines and tags such as [Verse].
 */
export function parse(text) {
  let shift = 0;
  const lines = [];
  for (const line of String(text).split(/\r\n|\r|\n/)) {
    const offset = OFFSET.exec(line);
    if (offset) shift = Number(offset[1]) / 1000;
    const stamps = [...line.matchAll(STAMP)];
    if (!stamps.length) continue;
    const last = stamps[stamps.length - 1];
    const words = line.slice(last.index + last[0].length).trim();
    if (TAG.test(words)) continue;
    for (const stamp of stamps) {
      lines.push({ time: Number(stamp[1]) * 60 + Number(stamp[2].replace(":", ".")), text: words });
    }
  }
  return lines.map((line) => ({ ...line, time: line.time - shift })).sort((one, other) => one.time - other.time);
}

/** Return the index of the line sung at a time; -1 before the first one. */
export function lineAt(lines, seconds) {
  let low = 0;
  let high = lines.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lines[middle].time <= seconds) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
