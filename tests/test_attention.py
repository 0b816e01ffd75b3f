"""Both forms of attention against a dense masked softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models import attention as attention_module
from acestep_jax.models.attention import attention
from tests.parity import assert_close, normal, relative_error


def dense(q, k, v, mask):
    """[B, T, N, H] in float64, every score computed. mask broadcasts to [B, 1, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def inputs(t, s=None, heads=4, key_heads=2):
    s = t if s is None else s
    return normal(2, t, heads, 8), normal(2, s, key_heads, 8, seed=1), normal(2, s, key_heads, 8, seed=2)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("length", [5, 8, 9, 16, 17, 40, 53])
@pytest.mark.parametrize("padded", [False, True])
def test_banded(length, window, padded):
    """|i - j| <= window, inclusive; lengths around multiples of the window; padding keys."""
    q, k, v = inputs(length)
    i = np.arange(length)
    mask = np.abs(i[:, None] - i[None, :]) <= window
    key_mask = i[None, :] < np.array([[length], [length - 2]]) if padded else None
    if padded:
        mask = mask & key_mask[:, None, None, :]
    got = attention(q, k, v, window=window, key_mask=key_mask)
    rows = np.broadcast_to(mask, (2, 1, length, length)).any(-1)[:, 0]  # queries that see a key
    assert_close(np.asarray(got)[rows], dense(q, k, v, mask)[rows], 1e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [7, 8, 9, 21])
def test_full_in_blocks(length, causal, monkeypatch):
    """Blocks of queries give what one piece gives, also where the last block is short."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 8)
    q, k, v = inputs(length)
    key_mask = np.arange(length)[None, :] < np.array([[length], [length - 3]])
    mask = key_mask[:, None, None, :]
    if causal:
        mask = mask & np.tril(np.ones((length, length), bool))
    assert_close(attention(q, k, v, causal=causal, key_mask=key_mask), dense(q, k, v, mask), 1e-6)


def test_cross_attention_without_grouping():
    q, k, v = inputs(11, 5, heads=3, key_heads=3)
    assert_close(attention(q, k, v), dense(q, k, v, True), 1e-6)


def test_a_query_without_keys_is_finite():
    q, k, v = inputs(4)
    got = attention(q, k, v, key_mask=np.zeros((2, 4), bool))
    assert_close(got[:, :, ::2], np.broadcast_to(v.mean(1, keepdims=True), v.shape), 1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients(window, monkeypatch):
    """Against central differences in a random direction."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 8)
    q, k, v = inputs(21)
    i = np.arange(21)
    mask = True if window is None else np.abs(i[:, None] - i[None, :]) <= window
    weights = normal(*q.shape, seed=3)
    gradients = jax.grad(lambda *x: jnp.sum(attention(*x, window=window) * weights), argnums=(0, 1, 2))(q, k, v)
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
    plain = attention(q, k, v, window=window)
    dropped = drop(keys)
    assert relative_error(dropped[0], plain) > 0.05
    assert relative_error(jnp.mean(dropped, 0), plain) < 0.05
    np.testing.assert_array_equal(attention(q, k, v, window=window, dropout=0.2), plain)
