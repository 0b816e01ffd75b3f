"""Convolutions over time, x [B, T, C], in the form that each backend compiles and runs well."""

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels import products
from acestep_jax.models.kernels.platform import platform

# On a TPU, time axes of this length or more are cut into rows of at most this many samples.
ROW = 1024

# On a CPU with fast products in half precision, which XLA's convolutions do not use, a convolution of so many channels
# is a product for each tap, in blocks of so many samples.
TAPS_FROM, BLOCK = 256, 1024

# Latent frames that the autoencoder processes at once, which bounds its memory: at most 1.1 GB for any song in bfloat16
# on a CPU, else less than 1 GB. On a CPU, 30 s are three windows. A T4's activations are float32, as a CPU's; a TPU's
# compile time grows with the frames.
TILE_FRAMES = {"cpu": 276, "gpu": 192, "tpu": 128}


def default_tile_frames() -> int:
    """Return how many latent frames the autoencoder processes at once unless told otherwise."""
    return TILE_FRAMES.get(platform(), TILE_FRAMES["cpu"])


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, padding: int = 0) -> jax.Array:
    """Convolve x [B, T, in] with a kernel [size, in, out], with `padding` zeros at each end."""
    size = kernel.shape[0]
    is_fast_cpu = platform() == "cpu" and products.is_fast(x.dtype)
    if size == 1 and stride == 1 and padding == 0 and (is_fast_cpu or platform() == "tpu"):
        return products.dot_general(x, kernel[0].astype(x.dtype), (((2,), (0,)), ((), ())))
    if stride == 1 and is_fast_cpu and kernel.shape[1] >= TAPS_FROM:
        return _convolve_by_taps(x, kernel.astype(x.dtype), dilation, padding)
    if platform() == "tpu":
        same = stride == 1 and padding * 2 == (size - 1) * dilation
        if same and (rows := _rows(x.shape[1])):
            return _convolve_rows(x, kernel, dilation, padding, rows)
    return _convolve(x, kernel, stride, dilation, padding)


def convolve_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, T, in] to [B, T * stride, out], with 2 * stride taps and padding stride / 2.

    kernel: [2, in, stride, out].

    Sample r of frame j depends on inputs j - 1, j and, after the crop, j + 1. So this is an ordinary convolution of
    size two with `stride` times the channels, whose output is reshaped row by row.
    """
    _, inputs, stride, outputs = kernel.shape
    crop = stride // 2
    if platform() == "tpu" and x.shape[1] >= ROW:
        # The crop would shift the rows of the output, which is slow on a TPU; shift the kernel instead, to size three.
        zeros = jnp.zeros_like(kernel[0, :, :crop])
        first = jnp.concatenate([kernel[0, :, crop:], zeros], axis=1)
        middle = jnp.concatenate([kernel[1, :, crop:], kernel[0, :, :crop]], axis=1)
        last = jnp.concatenate([zeros, kernel[1, :, :crop]], axis=1)
        shifted = jnp.stack([first, middle, last]).reshape(3, inputs, stride * outputs)
        return convolve(x, shifted, padding=1).reshape(x.shape[0], -1, outputs)
    if platform() == "cpu":
        # As a product: the kernel gradient of this convolution takes a hundred times as long with XLA for CPU.
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


def _convolve_by_taps(x: jax.Array, kernel: jax.Array, dilation: int, padding: int) -> jax.Array:
    """Compute `convolve` with a stride of 1, rounded once, as the sum of a product for each tap."""
    size, channels, outputs = kernel.shape
    b, reach = x.shape[0], (size - 1) * dilation
    length = x.shape[1] + 2 * padding - reach
    block = min(BLOCK, length)
    x = jnp.pad(x, ((0, 0), (padding, padding + -length % block), (0, 0)))

    def run(part: jax.Array) -> jax.Array:  # [B, block + reach, in]
        total, numbers = jnp.float32(0), (((2,), (0,)), ((), ()))
        for i in range(size):
            total += products.accumulated(part[:, i * dilation : i * dilation + block], kernel[i], numbers)
        return total.astype(x.dtype)

    # Cut before the loop: the gradient of slices within it would be added to a whole array in each iteration.
    parts = jnp.stack([x[:, start : start + block + reach] for start in range(0, length, block)])
    y = jax.lax.map(run, parts)  # [blocks, B, block, out]
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, outputs)[:, :length]


def _rows(length: int) -> int | None:
    """Return the number of rows to cut into, or None for one: at least eight, to fill a TPU's lanes, and preferably
    with a multiple of eight samples per row."""
    if length < ROW:
        return None
    counts = [n for n in range(8, length // 64 + 1) if length % n == 0 and length // n <= ROW]
    return next((n for n in counts if length // n % 8 == 0), counts[0] if counts else None)


def _convolve_rows(x, kernel, dilation, halo, rows):
    """Convolve a batch of rows, each with a halo of its neighbours' samples.

    XLA for TPU takes minutes to compile the decoder's convolutions over one long row; cut into rows, they run in a
    quarter of the time.
    """
    b, t, channels = x.shape
    x = x.reshape(b, rows, t // rows, channels)
    before = jnp.pad(x[:, :-1, t // rows - halo :], ((0, 0), (1, 0), (0, 0), (0, 0)))
    after = jnp.pad(x[:, 1:, :halo], ((0, 0), (0, 1), (0, 0), (0, 0)))
    x = jnp.concatenate([before, x, after], axis=2).reshape(b * rows, -1, channels)
    # Otherwise XLA would fuse the operations before it into the convolution, and recompute them for each tap.
    x = jax.lax.optimization_barrier(x)
    return _convolve(x, kernel, 1, dilation, 0).reshape(b, t, -1)
