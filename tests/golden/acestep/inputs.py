"""The inputs of the golden cases: initial noise, fresh noise of the SDE solver, and the sources.

noise(frames)       [1, frames, 8] float32, the noise at t = 1; a song of fewer frames takes the first of them
renoise(i, frames)  [1, frames, 8] float32, what step i of the SDE solver draws
wave(name)          [2, samples] float32 at 48 kHz, the source or reference called so in cases.json
"""

import numpy as np

CHANNELS = 8
WAVES = {
    "src288.wav": (288 * 1920, 1),
    "src2875.wav": (552000, 1),
    "short.wav": (100 * 1920, 2),
    "ref30.wav": (1440000, 3),
    "src20.wav": (500 * 1920, 4),
}


def noise(frames: int) -> np.ndarray:
    return np.random.default_rng(11).standard_normal((1, frames, CHANNELS)).astype(np.float32)


def renoise(i: int, frames: int) -> np.ndarray:
    return np.random.default_rng(100 + i).standard_normal((1, frames, CHANNELS)).astype(np.float32)


def wave(name: str) -> np.ndarray:
    samples, seed = WAVES[name]
    generator, t = np.random.default_rng(seed), np.arange(samples) / 48000
    swell = 1 + 0.5 * np.sin(2 * np.pi * 0.7 * t)
    rows = [0.3 * np.sin(2 * np.pi * f * t) * swell + 0.05 * generator.standard_normal(samples) for f in (220, 331)]
    return np.stack(rows).astype(np.float32)
