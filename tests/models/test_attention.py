"""All forms of attention against a dense masked softmax in float64, and the choice among them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax import InputError
from acestep_jax.models.attention import Attention, attention
from acestep_jax.models.config import AttentionConfig, Runtime
from acestep_jax.models.kernels import attention as kernels
from acestep_jax.models.kernels import blockwise, fused, windowed
from acestep_jax.models.kernels.attention import choose_kernel
from tests.jaxprs import equations
from tests.parity import assert_close, normal, relative_error

pytestmark = pytest.mark.unit


def dense(q, k, v, mask):
    """[B, T, N, H] in float64, every score computed. mask broadcasts to [B, 1, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def inputs(t, s=None, heads=4, key_heads=2, head_dim=8):
    s = t if s is None else s
    shapes = (2, t, heads, head_dim), (2, s, key_heads, head_dim), (2, s, key_heads, head_dim)
    return tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))


def run(*arrays, key_lengths=None, **static):
    """`attention`, compiled anew, because tests change the constants that it reads."""
    return jax.jit(functools.partial(attention, **static))(*arrays, key_lengths=key_lengths)


def within(lengths, s):
    """[B, 1, 1, S]: the keys before these lengths; all of them for None."""
    return True if lengths is None else (np.arange(s) < np.asarray(lengths)[:, None])[:, None, None]


def band(t, window):
    return abs(np.arange(t)[:, None] - np.arange(t)) <= window


# The smallest window and a larger one by default.
@pytest.mark.parametrize("window", [1, pytest.param(3, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("length", [5, 8, 9, 16, 17, 40, 53])
@pytest.mark.parametrize("padded", [False, True])
def test_banded(length, window, padded):
    """|i - j| <= window, inclusive; lengths around multiples of the window; padding keys."""
    q, k, v = inputs(length)
    lengths = np.array([length, length - 2], np.int32) if padded else None
    mask = band(length, window) & within(lengths, length)
    got = run(q, k, v, window=window, key_lengths=lengths)
    rows = np.broadcast_to(mask, (2, 1, length, length)).any(-1)[:, 0]  # queries that see a key
    assert_close(np.asarray(got)[rows], dense(q, k, v, mask)[rows], 1e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [7, 8, 9, 21])
def test_full_in_blocks(length, causal, monkeypatch):
    """Blocks of queries give what one piece gives, also where the last block is short."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 8)
    q, k, v = inputs(length)
    lengths = np.array([length, length - 3], np.int32)
    mask = within(lengths, length)
    if causal:
        mask = mask & np.tril(np.ones((length, length), bool))
    assert_close(run(q, k, v, causal=causal, key_lengths=lengths), dense(q, k, v, mask), 1e-6)


# Scores of a row of the two tests below: 2 heads * 11 queries * 21 keys, and 2 heads * 4 queries * 12 keys.
FORMS = {
    "all rows at once": ("gpu", 1),
    "all rows on a CPU": ("cpu", 1 << 20),
    "two rows at a time": ("cpu", 2 * 2 * 11 * 21),
    "one row after the other": ("cpu", 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_chunked_over_rows(form, monkeypatch):
    name, scores = FORMS[form]
    monkeypatch.setattr(blockwise, "platform", lambda: name)
    monkeypatch.setattr(blockwise, "CPU_SCORES", scores)
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 16)
    q, k, v = inputs(21)
    for causal, lengths in ((False, None), (True, np.array([21, 9], np.int32))):
        got = jax.jit(functools.partial(blockwise.chunked, causal=causal, key_lengths=lengths))(q, k, v)
        mask = np.tril(np.ones((21, 21), bool)) if causal else True
        assert_close(got, dense(q, k, v, mask & within(lengths, 21)), 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_banded_over_rows(form, monkeypatch):
    name, scores = FORMS[form]
    monkeypatch.setattr(blockwise, "platform", lambda: name)
    monkeypatch.setattr(blockwise, "CPU_SCORES", scores)
    q, k, v = inputs(21)
    lengths = np.array([21, 18], np.int32)
    halo = [blockwise.pad_time(x, 4, 4) for x in (k, v)]
    got = jax.jit(functools.partial(blockwise.banded, window=4, key_lengths=lengths))(q, *halo)
    assert_close(got, dense(q, k, v, band(21, 4) & within(lengths, 21)), 1e-6)


def test_a_cpu_takes_as_many_rows_as_fit(monkeypatch):
    """Of six rows: the largest divisor of six within the limit."""
    monkeypatch.setattr(blockwise, "CPU_SCORES", 40)
    rows = normal(6, 5)
    for scores, expected in {5: 6, 10: 3, 20: 2, 30: 1, 50: 1}.items():

        def squares(x, scores=scores):
            return blockwise._over_rows(lambda row: row[0] ** 2, (x,), scores)

        np.testing.assert_allclose(squares(rows), rows**2, rtol=1e-6)
        (loop,) = equations(squares, rows, name="scan")
        assert loop.params["length"] * expected == 6


def test_cross_attention_without_grouping():
    q, k, v = inputs(11, 5, heads=3, key_heads=3)
    assert_close(run(q, k, v), dense(q, k, v, True), 1e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_a_query_without_keys_is_finite(window):
    q, k, v = inputs(4)
    got = run(q, k, v, window=window, key_lengths=np.zeros(2, np.int32))
    assert np.isfinite(got).all()


@pytest.mark.parametrize("window", [None, 4])
def test_gradients(window, monkeypatch):
    """Against central differences in a random direction."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 8)
    q, k, v = inputs(21)
    mask = True if window is None else band(21, window)
    weights = normal(*q.shape, seed=3)
    loss = jax.grad(lambda *x: jnp.sum(attention(*x, window=window) * weights), argnums=(0, 1, 2))
    gradients = jax.jit(loss)(q, k, v)
    for n, gradient in enumerate(gradients):
        direction = normal(*gradient.shape, seed=4).astype(np.float64)

        def loss(step, n=n, direction=direction):
            moved = [x + step * direction if m == n else x for m, x in enumerate((q, k, v))]
            return np.sum(dense(*moved, mask) * weights)

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert np.sum(gradient * direction) == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_dropout_keeps_the_mean(window):
    q, k, v = inputs(30)
    keys = jax.random.split(jax.random.key(0), 4000)
    drop = jax.jit(
        jax.vmap(lambda key: attention(q, k, v, window=window, dropout=0.2, dropout_key=key)),
    )
    plain = run(q, k, v, window=window)
    dropped = drop(keys)
    assert relative_error(dropped[0], plain) > 0.05
    assert relative_error(jnp.mean(dropped, 0), plain) < 0.05
    np.testing.assert_array_equal(run(q, k, v, window=window, dropout=0.2), plain)


def splash(*arrays, lengths=None):
    return fused.splash(*arrays, key_lengths=lengths, interpret=True)


# T, S and key lengths: several tiles, of which the last are padded; padding alone, and neither.
SPLASH = [(200, 300, (300, 170)), (130, 70, None), (128, 256, None)]


@pytest.mark.parametrize(("t", "s", "lengths"), SPLASH)
def test_splash(t, s, lengths, monkeypatch):
    monkeypatch.setattr(fused, "SPLASH_BLOCK", 128)
    q, k, v = inputs(t, s, head_dim=128)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    assert_close(jax.jit(splash)(q, k, v, lengths=lengths), dense(q, k, v, within(lengths, s)), 1e-5)


def test_splash_gradients():
    arrays = inputs(140, 200, head_dim=128)
    lengths, weights = np.array([200, 90], np.int32), normal(2, 140, 4, 128, seed=3)

    def gradients(kernel):
        loss = jax.grad(lambda *x: jnp.sum(kernel(*x) * weights), argnums=(0, 1, 2))
        return jax.jit(loss)(*arrays)

    expected = gradients(lambda *x: blockwise.chunked(*x, key_lengths=lengths))
    for found, reference in zip(gradients(lambda *x: splash(*x, lengths=lengths)), expected, strict=True):
        assert_close(found, reference, 1e-4)


def windowed_splash(q, k, v, first_query, lengths, window):
    return fused.splash(q, k, v, window=window, first_query=first_query, key_lengths=lengths, interpret=True)


def windowed_triton(q, k, v, first_query, lengths, window):
    return windowed.windowed(q, k, v, jnp.int32(first_query), lengths, window, True)


@pytest.fixture(params=[(windowed_splash, 128), (windowed_triton, 16)], ids=["splash", "triton"])
def windowed_kernel(request, monkeypatch):
    """A kernel with a window in interpret mode, of small tiles, and the head dim that it takes."""
    monkeypatch.setattr(fused, "WINDOW_BLOCKS", (128, 128))
    monkeypatch.setattr(windowed, "QUERIES", 32)
    monkeypatch.setattr(windowed, "KEYS", 16)
    kernel, head_dim = request.param
    return jax.jit(kernel, static_argnums=5), head_dim


# Tokens, window and key lengths: several tiles, a window that is no multiple of one, fewer keys than a tile visits.
WINDOWED = [(300, 20, (300, 170)), (256, 64, (256, 1)), (40, 30, (40, 39))]


@pytest.mark.parametrize(("t", "window", "lengths"), WINDOWED)
def test_windowed_kernels(windowed_kernel, t, window, lengths):
    kernel, head_dim = windowed_kernel
    q, k, v = inputs(t, head_dim=head_dim)
    lengths = np.array(lengths, np.int32)
    expected = dense(q, k, v, band(t, window) & within(lengths, t))
    got = kernel(q, k, v, 0, lengths, window)
    sees = (np.arange(t) - window < lengths[:, None])[:, :, None, None]  # others see nothing, and get anything finite
    assert np.isfinite(got).all()
    assert_close(np.where(sees, got, 0), np.where(sees, expected, 0), 1e-5)


@pytest.mark.parametrize("part", range(3))
def test_windowed_kernels_of_a_part_of_the_queries(windowed_kernel, part):
    """As on a mesh split along time: with the neighbours' keys, zeros before the first and after the last."""
    kernel, head_dim = windowed_kernel
    t, window, size = 300, 20, 100
    q, k, v = inputs(t, head_dim=head_dim)
    lengths = np.array([300, 170], np.int32)
    expected = dense(q, k, v, band(t, window) & within(lengths, t))
    first = part * size
    around = [
        np.pad(x, ((0, 0), (window, window), (0, 0), (0, 0)))[:, first : first + size + 2 * window] for x in (k, v)
    ]
    got = kernel(q[:, first : first + size], *around, first, lengths, window)
    sees = (np.arange(first, first + size) - window < lengths[:, None])[:, :, None, None]
    assert_close(np.where(sees, got, 0), np.where(sees, expected[:, first : first + size], 0), 1e-5)


def test_derivatives_of_windowed_kernels(windowed_kernel):
    """In reverse mode, against the plain form; the one for GPUs has derivatives in forward mode as well."""
    kernel, head_dim = windowed_kernel
    arrays = inputs(140, head_dim=head_dim)
    lengths, weights = np.array([140, 90], np.int32), normal(*arrays[0].shape, seed=3)
    plain = lambda *x: attention(*x, window=20, key_lengths=lengths)  # noqa: E731
    fast = lambda *x: kernel(*x, 0, lengths, 20)  # noqa: E731
    gradients = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) * weights), argnums=(0, 1, 2)))(*arrays)  # noqa: E731
    # What sees nothing is anything, and so are its derivatives.
    weights = np.where((np.arange(140) < lengths[:, None] + 20)[:, :, None, None], weights, 0)
    for found, expected in zip(gradients(fast), gradients(plain), strict=True):
        assert_close(found, expected, 1e-4)
    if head_dim == 16:
        slopes = [jax.jvp(f, arrays, arrays)[1] for f in (fast, plain)]
        assert_close(*slopes, 1e-5)


@pytest.fixture
def backend(monkeypatch):
    """Makes the library believe in another backend, and perhaps a GPU of some compute capability."""

    def pretend(name, capability=0.0):
        monkeypatch.setattr(kernels, "platform", lambda: name)
        monkeypatch.setattr(kernels, "compute_capability", lambda: capability)

    return pretend


# Backend, compute capability, dtype, head dim, T, S: what "auto" gives.
AUTO = [
    ("cpu", 0.0, "bfloat16", 128, 512, 512, "xla"),
    ("gpu", 9.0, "bfloat16", 128, 512, 512, "cudnn"),
    ("gpu", 8.0, "float16", 64, 128, 128, "cudnn"),
    ("gpu", 9.0, "float32", 128, 512, 512, "xla"),
    ("gpu", 7.5, "bfloat16", 128, 512, 512, "xla"),
    ("gpu", 0.0, "bfloat16", 128, 512, 512, "xla"),
    ("gpu", 9.0, "bfloat16", 132, 512, 512, "xla"),
    ("gpu", 9.0, "bfloat16", 256, 512, 512, "xla"),
    ("gpu", 9.0, "bfloat16", 128, 127, 512, "xla"),
    ("gpu", 9.0, "bfloat16", 128, 512, 127, "xla"),
    ("tpu", 0.0, "bfloat16", 128, 512, 512, "splash"),
    ("tpu", 0.0, "float32", 128, 128, 128, "splash"),
    ("tpu", 0.0, "bfloat16", 64, 512, 512, "xla"),
    ("tpu", 0.0, "bfloat16", 128, 127, 512, "xla"),
    ("tpu", 0.0, "bfloat16", 128, 512, 127, "xla"),
]


@pytest.mark.parametrize(("name", "capability", "dtype", "head_dim", "t", "s", "expected"), AUTO)
def test_auto(backend, name, capability, dtype, head_dim, t, s, expected):
    backend(name, capability)
    q, k = (jax.ShapeDtypeStruct((1, length, 4, head_dim), dtype) for length in (t, s))
    assert choose_kernel("auto", q, k) == expected
    assert choose_kernel("xla", q, k) == "xla"


def test_a_kernel_of_another_backend_is_refused(backend):
    q = jax.ShapeDtypeStruct((1, 512, 4, 128), "bfloat16")
    assert choose_kernel("auto", q, q) == "xla"  # on the CPU that is really there
    for kernel, own in (("cudnn", "gpu"), ("splash", "tpu")):
        with pytest.raises(InputError, match=f'"{kernel}" runs on {own} only, found cpu'):
            choose_kernel(kernel, q, q)
    backend("tpu")
    assert choose_kernel("splash", q, q) == "splash"
    with pytest.raises(InputError, match='"cudnn" runs on gpu only, found tpu'):
        choose_kernel("cudnn", q, q)


def test_cudnn_is_refused_in_float32(backend):
    backend("gpu", 9.0)
    q = jax.ShapeDtypeStruct((1, 512, 4, 128), "bfloat16")
    assert choose_kernel("cudnn", q, q) == "cudnn"
    q = jax.ShapeDtypeStruct((1, 512, 4, 128), "float32")
    with pytest.raises(InputError, match='"cudnn" takes bfloat16 or float16, found float32'):
        choose_kernel("cudnn", q, q)


@pytest.mark.parametrize(("name", "kernel"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_attention_runs_the_kernel_of_the_backend(backend, monkeypatch, name, kernel):
    """With the lengths of the keys, and only for what the kernel can do."""
    backend(name, 9.0)
    seen = []

    def record(called):
        def run(q, k, v, *, key_lengths=None, window=None, first_query=0):
            seen.append((called, key_lengths if window is None else window))
            return blockwise.chunked(q, k, v, key_lengths=key_lengths)

        return run

    for called in ("cudnn", "splash"):
        monkeypatch.setattr(fused, called, record(called))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(130, head_dim=128))
    lengths = np.array([130, 70], np.int32)
    attend = functools.partial(attention, key_lengths=lengths)
    assert_close(jax.jit(attend)(q, k, v), dense(q, k, v, within(lengths, 130)), 1e-2)
    jax.eval_shape(functools.partial(attention, kernel=kernel), q, k, v)
    assert seen == [(kernel, lengths), (kernel, None)]
    monkeypatch.setattr(kernels, "windowed", lambda q, k, v, first, lengths, window: seen.append((name, window)))
    attention(q, k, v, window=8)
    assert seen.pop() == (dict(gpu="gpu", tpu="splash")[name], 8)
    for others in (dict(kernel="xla"), dict(kernel="xla", window=8), dict(causal=True)):
        jax.eval_shape(functools.partial(attention, **others), q, k, v)
    for window in (None, 8):
        dropped = dict(window=window, dropout=0.1, dropout_key=jax.random.key(0))
        jax.eval_shape(functools.partial(attention, **dropped), q, k, v)
    assert len(seen) == 2


SMALL = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)


def test_the_runtime_names_the_kernel():
    config, runtime = AttentionConfig(**SMALL), Runtime(attention="cudnn")
    with pytest.raises(InputError, match='"cudnn" runs on gpu only, found cpu'):
        jax.eval_shape(lambda x: Attention(config, runtime=runtime, rngs=nnx.Rngs(0))(x), normal(1, 8, 16))
    with pytest.raises(InputError, match="Runtime.attention: expected one of auto, .*, found 'flash'"):
        Runtime(attention="flash")
