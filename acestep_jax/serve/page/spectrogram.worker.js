// Computes spectrograms in a worker, so that the page does not freeze.
import { spectrogram } from "./fft.js";

self.addEventListener("message", ({ data }) => {
  const levels = spectrogram(data.samples, data.rate, data.columns, data.rows);
  self.postMessage({ id: data.id, levels }, [levels.buffer]);
});
