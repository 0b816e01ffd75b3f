"""Convolutions over time, x [B, T, C], in the form that each backend compiles and runs well."""

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import platform

# On a TPU, from this length on, time is cut into rows of at most as many samples.
ROW = 1024

# Latent frames of a song that the autoencoder takes at once (20.5 s): what bounds its memory, whatever the length.
# A TPU takes fewer: the time that XLA needs to compile grows with them.
TILE_FRAMES, TPU_TILE_FRAMES = 512, 128


def default_tile_frames() -> int:
    """Return how many latent frames the autoencoder takes at once unless told otherwise."""
    return TPU_TILE_FRAMES if platform() == "tpu" else TILE_FRAMES


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, padding: int = 0) -> jax.Array:
    """Convolve x [B, T, in] with a kernel [size, in, out], with `padding` zeros at either end."""
    size = kernel.shape[0]
    if platform() == "tpu":
        if size == 1 and stride == 1 and padding == 0:
            return x @ kernel[0].astype(x.dtype)
        same = stride == 1 and padding * 2 == (size - 1) * dilation
        if same and (rows := _rows(x.shape[1])):
            return _convolve_rows(x, kernel, dilation, padding, rows)
    return _convolve(x, kernel, stride, dilation, padding)


def convolve_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, T, in] to [B, T * stride, out], with 2 * stride taps and padding stride / 2.

    kernel: [2, in, stride, out].

    Sample r of frame j sees inputs j - 1, j and, after the crop, j + 1. So it is an ordinary convolution of size two
    with `stride` times the channels, whose output is read row by row.
    """
    _, inputs, stride, outputs = kernel.shape
    crop = stride // 2
    if platform() == "tpu" and x.shape[1] >= ROW:
        # The crop shifts what is read row by row, which a TPU does slowly; here the kernel is shifted, to size three.
        zeros = jnp.zeros_like(kernel[0, :, :crop])
        first = jnp.concatenate([kernel[0, :, crop:], zeros], axis=1)
        middle = jnp.concatenate([kernel[1, :, crop:], kernel[0, :, :crop]], axis=1)
        last = jnp.concatenate([zeros, kernel[1, :, :crop]], axis=1)
        shifted = jnp.stack([first, middle, last]).reshape(3, inputs, stride * outputs)
        return convolve(x, shifted, padding=1).reshape(x.shape[0], -1, outputs)
    if platform() == "cpu":
        # A product: XLA for CPU takes a hundred times as long for the gradient of this convolution's kernel.
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        pairs = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1)
        y = pairs @ kernel.reshape(2 * inputs, stride * outputs).astype(x.dtype)
    else:
        y = _convolve(x, kernel.reshape(2, inputs, stride * outputs), 1, 1, 1)
    y = y.reshape(x.shape[0], -1, outputs)  # [B, (T + 1) * stride, out]
    return y[:, crop : y.shape[1] - crop]


def _convolve(x, kernel, stride, dilation, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride,),
        padding=[(padding, padding)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


def _rows(length: int) -> int | None:
    """Return how many rows to cut into, None for one: at least eight, so to fill a TPU's lanes; preferably rows of a
    multiple of eight samples."""
    if length < ROW:
        return None
    counts = [n for n in range(8, length // 64 + 1) if length % n == 0 and length // n <= ROW]
    return next((n for n in counts if length // n % 8 == 0), counts[0] if counts else None)


def _convolve_rows(x, kernel, dilation, halo, rows):
    """Convolve a batch of rows, each with what it needs of its neighbours.

    XLA for TPU takes minutes to compile the decoder's convolutions over one long row; in rows they run in a quarter of
    the time.
    """
    b, t, channels = x.shape
    x = x.reshape(b, rows, t // rows, channels)
    before = jnp.pad(x[:, :-1, t // rows - halo :], ((0, 0), (1, 0), (0, 0), (0, 0)))
    after = jnp.pad(x[:, 1:, :halo], ((0, 0), (0, 1), (0, 0), (0, 0)))
    x = jnp.concatenate([before, x, after], axis=2).reshape(b * rows, -1, channels)
    # What comes before would be fused into the convolution, and computed again for each of its taps.
    x = jax.lax.optimization_barrier(x)
    return _convolve(x, kernel, 1, dilation, 0).reshape(b, t, -1)
