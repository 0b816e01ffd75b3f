// Spectrograms with the fast Fourier transform. No DOM here: it runs in a worker.

/** Return a function that transforms real and imaginary parts in place; `size` is a power of two. */
export function transform(size) {
  const cosines = new Float64Array(size / 2);
  const sines = new Float64Array(size / 2);
  for (let k = 0; k < size / 2; k++) {
    cosines[k] = Math.cos((-2 * Math.PI * k) / size);
    sines[k] = Math.sin((-2 * Math.PI * k) / size);
  }
  const bits = Math.log2(size);
  const reversed = new Uint32Array(size);
  for (let i = 1; i < size; i++) reversed[i] = (reversed[i >> 1] >> 1) | ((i & 1) << (bits - 1));

  return (real, imaginary) => {
    for (let i = 0; i < size; i++) {
      const j = reversed[i];
      if (j > i) {
        [real[i], real[j]] = [real[j], real[i]];
        [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
      }
    }
    for (let half = 1; half < size; half *= 2) {
      const stride = size / (2 * half);
      for (let start = 0; start < size; start += 2 * half) {
        for (let k = 0; k < half; k++) {
          const upper = start + k;
          const lower = upper + half;
          const c = cosines[k * stride];
          const s = sines[k * stride];
          const re = real[lower] * c - imaginary[lower] * s;
          const im = real[lower] * s + imaginary[lower] * c;
          real[lower] = real[upper] - re;
          imaginary[lower] = imaginary[upper] - im;
          real[upper] += re;
          imaginary[upper] += im;
        }
      }
    }
  };
}

/**
 * Return the levels of audio, [columns x rows] bytes, from the top row (high frequencies) down: 255 is the loudest
 * level, 0 is `floor` dB below it. Rows are spaced logarithmically, starting at `low` Hz.
 */
export function spectrogram(samples, rate, columns, rows, { size = 2048, low = 40, floor = 80 } = {}) {
  const fft = transform(size);
  const window = Float64Array.from({ length: size }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size));
  const real = new Float64Array(size);
  const imaginary = new Float64Array(size);
  const high = rate / 2;
  const edges = Array.from({ length: rows + 1 }, (_, i) => (low * (high / low) ** (i / rows) * size) / rate);
  const power = new Float64Array(columns * rows);
  let loudest = 1e-12;
  for (let column = 0; column < columns; column++) {
    const middle = ((column + 0.5) * samples.length) / columns;
    const start = Math.round(middle - size / 2);
    for (let i = 0; i < size; i++) {
      real[i] = (samples[start + i] ?? 0) * window[i];
      imaginary[i] = 0;
    }
    fft(real, imaginary);
    for (let row = 0; row < rows; row++) {
      const from = Math.max(1, Math.floor(edges[row]));
      const to = Math.min(size / 2, Math.max(from + 1, Math.ceil(edges[row + 1])));
      let most = 0;
      for (let k = from; k < to; k++) most = Math.max(most, real[k] ** 2 + imaginary[k] ** 2);
      power[(rows - 1 - row) * columns + column] = most;
      loudest = Math.max(loudest, most);
    }
  }
  return Uint8Array.from(power, (value) => {
    const decibels = 10 * Math.log10(value / loudest + 1e-20);
    return Math.round(255 * Math.max(0, 1 + decibels / floor));
  });
}
