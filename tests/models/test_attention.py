"""Attention in plain JAX against a dense masked softmax in float64, and the choice among its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax import InputError
from acestep_jax.models.attention import Attention, attention
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.kernels import attention as kernels
from acestep_jax.models.kernels import blockwise, fused
from acestep_jax.models.kernels.attention import choose_kernel
from acestep_jax.models.runtime import Runtime
from tests.attention import band, dense, inputs, within
from tests.jaxprs import equations
from tests.parity import assert_close, normal, relative_error

pytestmark = pytest.mark.unit


def run(*arrays, key_lengths=None, **static):
    """`attention`, compiled anew, because tests change the constants that it reads."""
    return jax.jit(functools.partial(attention, **static))(*arrays, key_lengths=key_lengths)


# By default a window of 8, and the smallest, of which every length is a multiple, with few of the lengths.
BANDED = [
    pytest.param(length, window, marks=[pytest.mark.slow] * (window == 3 or window == 1 and length not in (5, 16, 53)))
    for length in (5, 8, 9, 16, 17, 40, 53)
    for window in (1, 3, 8)
]


@pytest.mark.heavy
@pytest.mark.parametrize("length, window", BANDED)
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


@pytest.mark.heavy
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


@pytest.mark.heavy
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


@pytest.mark.heavy
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


@pytest.mark.heavy
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


@pytest.fixture
def backend(monkeypatch):
    """Makes the library believe in another backend, and perhaps a GPU of some compute capability."""

    def pretend(name, capability=0.0):
        monkeypatch.setattr(kernels, "platform", lambda: name)
        monkeypatch.setattr(kernels, "compute_capability", lambda: capability)
        monkeypatch.setattr(kernels, "runs_triton", lambda: name == "gpu" and capability >= 8)

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


@pytest.mark.heavy
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
