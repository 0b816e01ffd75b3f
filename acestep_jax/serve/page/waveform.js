// Audio as pictures: decoding, peaks, and drawing them on a canvas.
import { colour } from "./dom.js";

const RATE = 48_000; // sample rate for spectrograms and peaks, independent of the device

/** Return the samples of a sound file, decoded by the browser; reject if it cannot decode it. */
export async function decode(blob) {
  const context = new OfflineAudioContext(1, 1, RATE);
  return context.decodeAudioData(await blob.arrayBuffer());
}

/** Return the minimum and maximum sample of each of `count` parts, interleaved, from -127 to 127, like the server. */
export function peaksOf(buffer, count) {
  const found = new Array(2 * count).fill(0);
  const hop = Math.max(1, Math.ceil(buffer.length / count));
  const stride = Math.max(1, Math.floor(hop / 400)); // enough to see it
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    const samples = buffer.getChannelData(channel);
    for (let column = 0; column * hop < samples.length; column++) {
      let low = channel ? found[2 * column] / 127 : Infinity;
      let high = channel ? found[2 * column + 1] / 127 : -Infinity;
      for (let i = column * hop; i < Math.min(samples.length, (column + 1) * hop); i += stride) {
        if (samples[i] < low) low = samples[i];
        if (samples[i] > high) high = samples[i];
      }
      found[2 * column] = Math.max(-127, Math.round(low * 127));
      found[2 * column + 1] = Math.min(127, Math.round(high * 127));
    }
  }
  return found;
}

/** Return the mean of all channels. */
export function mono(buffer) {
  const mixed = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    const samples = buffer.getChannelData(channel);
    for (let i = 0; i < mixed.length; i++) mixed[i] += samples[i] / buffer.numberOfChannels;
  }
  return mixed;
}

/** Set a canvas to the screen's resolution; return its context, in CSS pixels, and its size. */
export function fitted(canvas) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.max(1, canvas.clientWidth);
  const height = Math.max(1, canvas.clientHeight);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/**
 * Draw peaks as bars between two fractions of the width; bars before `played`, a fraction of the audio, have the played
 * colour.
 */
export function drawPeaks(canvas, peaks, { from = 0, to = 1, played = 0, tone = "--wave-played" } = {}) {
  const { context, width, height } = fitted(canvas);
  const left = from * width;
  const span = (to - from) * width;
  const bars = Math.max(1, Math.floor(span / 3));
  const middle = height / 2;
  const columns = peaks.length / 2;
  const plain = colour("--wave");
  const done = colour(tone);
  for (let bar = 0; bar < bars; bar++) {
    let low = 0;
    let high = 0;
    const last = Math.max(Math.floor((bar * columns) / bars) + 1, Math.floor(((bar + 1) * columns) / bars));
    for (let column = Math.floor((bar * columns) / bars); column < last; column++) {
      low = Math.min(low, peaks[2 * column]);
      high = Math.max(high, peaks[2 * column + 1]);
    }
    const top = middle - Math.max(1, (high / 127) * (middle - 1));
    const bottom = middle + Math.max(1, (-low / 127) * (middle - 1));
    context.fillStyle = (bar + 0.5) / bars < played ? done : plain;
    context.fillRect(left + (bar * span) / bars, top, Math.max(1, span / bars - 1), bottom - top);
  }
}

let worker = null;
let asked = 0;

/** Return the levels of a sound file, [columns x rows] bytes, see fft.js. */
export async function levelsOf(blob, columns, rows) {
  const samples = mono(await decode(blob));
  worker ??= new Worker("/static/spectrogram.worker.js", { type: "module" });
  const id = ++asked;
  return new Promise((resolve, reject) => {
    const listen = ({ data }) => {
      if (data.id !== id) return;
      worker.removeEventListener("message", listen);
      resolve(data.levels);
    };
    worker.addEventListener("message", listen);
    worker.addEventListener("error", () => reject(new Error("the spectrogram could not be computed")), { once: true });
    worker.postMessage({ id, samples, rate: RATE, columns, rows }, [samples.buffer]);
  });
}

// A heat colour map from dark to light; the same in both themes, like a picture.
const STOPS = [
  [12, 10, 24],
  [74, 20, 78],
  [178, 48, 62],
  [246, 134, 48],
  [255, 238, 170],
];

/** Draw levels on a canvas of the same size in pixels. */
export function drawLevels(canvas, levels, columns, rows) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < levels.length; i++) {
    const place = (levels[i] / 255) * (STOPS.length - 1);
    const one = Math.min(Math.floor(place), STOPS.length - 2);
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = STOPS[one][c] + (STOPS[one + 1][c] - STOPS[one][c]) * (place - one);
    }
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
