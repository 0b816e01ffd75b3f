"""The initial noise: JAX's random keys and normal numbers, or the numbers that PyTorch draws on an NVIDIA GPU.

PyTorch's noise is for reproducing songs that were made with it. Each GPU thread has a Philox4x32-10 generator with the
seed as its key and the thread's index in the counter. A call returns four words, which the Box-Muller transform turns
into four normal numbers; the thread writes them with a stride of the number of threads. There is one thread for each
number, up to the number that the GPU can run at once: only longer tensors depend on the GPU.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); cuRAND's device functions and PyTorch's
`DistributionTemplates.h`. Logarithm and sine are rounded differently on the GPU: numbers agree to about 1e-6.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.settings import PRNG

# Concurrent threads: multiprocessors times threads per multiprocessor.
GPU_THREADS = {
    "A100": 108 * 2048,
    "H100": 132 * 2048,
    "H200": 132 * 2048,
    "L4": 58 * 1536,
    "T4": 40 * 1024,
    "V100": 80 * 2048,
    "RTX3090": 82 * 1536,
    "RTX4090": 128 * 1536,
    "RTX5090": 170 * 1536,
}
COMMON_THREADS = min(GPU_THREADS.values())  # up to this length, all GPUs draw the same numbers

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)


def key(seed: int) -> jax.Array:
    """Return the key of a seed from 0 to 2^32 - 1, independent of JAX's process-wide settings."""
    return jax.random.wrap_key_data(jnp.asarray(np.array([0, seed], np.uint32)), impl=PRNG)


def own_key(key: jax.Array) -> jax.Array:
    """Convert a key of any generator to one of ours, because other generators' numbers depend on the batch."""
    if jax.random.key_impl(key) == PRNG:
        return key
    own = jax.random.wrap_key_data(jnp.zeros(2, np.uint32), impl=PRNG)
    for word in np.asarray(jax.random.key_data(key), np.uint32).reshape(-1):
        own = jax.random.fold_in(own, word)
    return own


@functools.partial(jax.jit, static_argnums=1)
def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return [B, *shape] float32, each song from its own key, so that it does not depend on the other songs."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def gpu_threads(kind: str) -> int | None:
    """Return the concurrent threads of the GPU in "torch:A100", or the number in "torch:221184"; None for "torch".

    Raises:
        InputError: if `kind` is anything else, or the GPU is unknown.
    """
    name, _, gpu = kind.partition(":")
    if name != "torch":
        raise InputError(f"noise: expected jax, torch or torch:GPU, found {kind!r}")
    if not gpu:
        return None
    if gpu.isdecimal() and int(gpu) >= 256:
        return int(gpu)
    if gpu not in GPU_THREADS:
        raise InputError(
            f"noise: expected one of {', '.join(GPU_THREADS)} after torch:, or a GPU's number of multiprocessors times "
            f"threads of each, found {gpu!r}"
        )
    return GPU_THREADS[gpu]


def cuda_normal(seed: int, count: int, threads: int | None = None) -> np.ndarray:
    """Return [count] float32: `torch.randn(count, device="cuda")` of a new generator with this seed.

    Args:
        seed: 0 to 2^64 - 1.
        threads: number of threads that the GPU runs at once, see `GPU_THREADS`; None: unknown, which needs a small
            count.

    Raises:
        InputError: if the number of threads is needed but unknown.
    """
    if threads is None and count > COMMON_THREADS:
        raise InputError(f"noise: {count} numbers, above {COMMON_THREADS}, depend on the GPU; name it: torch:A100")
    threads = threads or COMMON_THREADS
    place = np.arange(count, dtype=np.uint64)
    call, lane = np.divmod(place // np.uint64(threads), np.uint64(4))
    zero = np.zeros_like(place)
    words = philox4x32([call, zero, place % np.uint64(threads), zero], (seed & 0xFFFFFFFF, seed >> 32))
    words = [word.astype(np.float32) for word in words]
    # Lanes 0 and 1 are the sine and the cosine of the first two words, 2 and 3 those of the others.
    first, second = np.where(lane < 2, words[0], words[2]), np.where(lane < 2, words[1], words[3])
    unit, turn = np.float32(2.0**-32), np.float32(2 * np.pi * 2.0**-32)
    radius = np.sqrt(np.float32(-2) * np.log(first * unit + unit / 2))
    angle = second * turn + turn / 2
    return (radius * np.where(lane % 2 == 0, np.sin(angle), np.cos(angle))).astype(np.float32)


def philox4x32(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Return ten rounds of Philox on four words each, arrays of uint64 below 2^32."""
    c = counter
    for i in range(10):
        keys = [np.uint64((k + i * weyl) & 0xFFFFFFFF) for k, weyl in zip(key, _WEYL, strict=True)]
        products = [m * word for m, word in zip(_MULTIPLIERS, c[::2], strict=True)]
        high, low = [p >> np.uint64(32) for p in products], [p & _LOW for p in products]
        c = [high[1] ^ c[1] ^ keys[0], low[1], high[0] ^ c[3] ^ keys[1], low[0]]
    return c
