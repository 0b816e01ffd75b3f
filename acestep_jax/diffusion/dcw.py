"""DCW, the differential correction in the wavelet domain: after each step of a solver, from t to t',

    d  = x' - x0,  x0 = x - t v            what the step left of the noise
    x' <- x' + low(t) P d + high(t) (d - P d)

P keeps the low band of the first level of a wavelet transform along time, and 1 - P the high band. `dcw_scaler` s and
`dcw_high_scaler` h give, by `dcw_mode`:

| mode   | low(t) | high(t)   |
|--------|--------|-----------|
| low    | s t    | 0         |
| high   | 0      | s (1 - t) |
| double | s t    | h (1 - t) |
| pix    | s      | s         |

With pix no transform is left, x' + s d. Source: arXiv 2604.16044, equations 18 to 21, as ACE-Step 1.5 uses it
(`acestep/models/common/dcw_correction.py` and `dcw_primitives.py`; d is zero beyond both ends of the song).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MODES = ("low", "high", "double", "pix")

# Scaling filters of the orthogonal wavelets that ACE-Step's page offers, as PyWavelets' `rec_lo`.
# Source: Daubechies, Ten Lectures on Wavelets, tables 6.1 (db), 6.3 (sym) and 8.1 (coif).
WAVELETS: dict[str, tuple[float, ...]] = {
    "haar": (0.7071067811865476, 0.7071067811865476),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db4": (
        *(0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854),
        *(-0.18703481171909309, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032),
    ),
    "sym4": (
        *(0.0322231006040427, -0.012603967262037833, -0.09921954357684722, 0.29785779560527736),
        *(0.8037387518059161, 0.49761866763201545, -0.02963552764599851, -0.07576571478927333),
    ),
    "sym8": (
        *(0.0018899503327594609, -0.0003029205147213668, -0.01495225833704823, 0.003808752013890615),
        *(0.049137179673607506, -0.027219029917056003, -0.05194583810770904, 0.3644418948353314),
        *(0.7771857517005235, 0.4813596512583722, -0.061273359067658524, -0.1432942383508097),
        *(0.007607487324917605, 0.03169508781149298, -0.0005421323317911481, -0.0033824159510061256),
    ),
    "coif2": (
        *(0.01638733646320364, -0.04146493678687178, -0.0673725547237256, 0.3861100668227629),
        *(0.8127236354494135, 0.4170051844232391, -0.07648859907828076, -0.05943441864643109),
        *(0.02368017194684777, 0.005611434819368834, -0.0018232088709110323, -0.000720549445520347),
    ),
}


def scales(mode: str, times: np.ndarray, scaler: float, high_scaler: float) -> np.ndarray:
    """Return [N, 2] float32, low(t) and high(t) of each step, for the table above.

    Args:
        mode: one of `MODES`.
        times: [N + 1], the schedule.
    """
    t = np.asarray(times, np.float64)[:-1]
    low, high = {
        "low": (scaler * t, 0 * t),
        "high": (0 * t, scaler * (1 - t)),
        "double": (scaler * t, high_scaler * (1 - t)),
        "pix": (scaler + 0 * t, scaler + 0 * t),
    }[mode]
    return np.stack([low, high], axis=-1).astype(np.float32)


def correct(x: jax.Array, x0: jax.Array, scales: jax.Array, wavelet: str = "haar") -> jax.Array:
    """Return x + low P (x - x0) + high (1 - P) (x - x0), of the shape and dtype of x.

    Args:
        x, x0: [B, T, C]; equal in the padding after a song, which then has no effect.
        scales: [2], low and high.
        wavelet: one of `WAVELETS`.
    """
    d = x - x0
    smooth = low_band(d, WAVELETS[wavelet])
    return x + scales[0] * smooth + scales[1] * (d - smooth)


def low_band(d: jax.Array, taps: Sequence[float]) -> jax.Array:
    """Return P d: the inverse transform of only the low band, of [B, T, C] along T.

    c_k = sum_i r_i d_(2 k + i - s) and (P d)_n = sum_k r_(n + s - 2 k) c_k with r the L taps and s = L - 2; d is zero
    outside of 0 ... T - 1, which is PyWavelets' mode "zero". P is exact for filters of even length.
    """
    frames, length = d.shape[1], len(taps)
    s = length - 2
    count = (frames + length - 1) // 2
    padded = jnp.pad(d, ((0, 0), (s, s + 1), (0, 0)))
    c = sum(r * padded[:, i : i + 2 * count - 1 : 2] for i, r in enumerate(taps))  # [B, count, C]
    assert isinstance(c, jax.Array)
    half, pairs = length // 2, -(-frames // 2)
    parts = [
        sum(taps[2 * q + parity] * c[:, half - 1 - q : half - 1 - q + pairs] for q in range(half)) for parity in (0, 1)
    ]
    return jnp.stack(parts, axis=2).reshape(d.shape[0], 2 * pairs, *d.shape[2:])[:, :frames]
