"""What tests of attention share: arrays, masks, and the reference in float64."""

import numpy as np

from tests.parity import normal


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


def within(lengths, s):
    """[B, 1, 1, S]: the keys before these lengths; all of them for None."""
    return True if lengths is None else (np.arange(s) < np.asarray(lengths)[:, None])[:, None, None]


def band(t, window):
    return abs(np.arange(t)[:, None] - np.arange(t)) <= window
