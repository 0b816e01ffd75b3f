"""Probabilities of the transformer's cross-attention against those of diffusers' queries and keys."""

import jax
import numpy as np
import pytest
import torch

from acestep_jax.errors import InputError
from acestep_jax.models.alignment import HEADS_2B, alignment_heads, cross_attention
from acestep_jax.models.config import TransformerConfig
from tests.models.test_transformer import inputs, pair
from tests.parity import as_torch, assert_close

HEADS = {1: (3,), 2: (0, 2)}


def test_probabilities_are_torchs():
    """Of a song and its half, in one batch: padding of neither frames nor condition is read."""
    theirs, ours = pair()
    latents, t, _, condition, context = inputs(ours.config)
    lengths, condition_lengths = np.int32([101, 50]), np.int32([7, 5])
    found = jax.jit(
        lambda model: cross_attention(
            model,
            latents,
            t,
            condition,
            context,
            heads=HEADS,
            lengths=lengths,
            encoder_lengths=condition_lengths,
        )
    )(ours)
    assert found.shape == (2, 3, 7, 51)
    seen = {}
    for layer in HEADS:
        for name in ("norm_q", "norm_k"):
            part = getattr(theirs.layers[layer].cross_attn, name)
            part.register_forward_hook(lambda _, args, out, key=(layer, name): seen.__setitem__(key, out))
    for i, (frames, size) in enumerate(zip(lengths, condition_lengths, strict=True)):
        with torch.no_grad():
            arguments = latents[i : i + 1, :frames], t[i : i + 1], t[i : i + 1], condition[i : i + 1, :size]
            theirs(*map(as_torch, (*arguments, context[i : i + 1, :frames])))
        rows = []
        for layer, heads in HEADS.items():
            q, k = (seen[layer, name][0].numpy() for name in ("norm_q", "norm_k"))  # [T, 4, H], [S, 2, H]
            for head in heads:
                scores = q[:, head] @ k[:, head // 2].T / 8**0.5
                e = np.exp(scores - scores.max(1, keepdims=True))
                rows.append((e / e.sum(1, keepdims=True)).T)
        tokens = -(-frames // 2)
        assert_close(np.asarray(found)[i, :, :size, :tokens], np.stack(rows))
        np.testing.assert_array_equal(np.asarray(found)[i, :, size:], 0)


def test_heads_are_those_of_the_config_or_of_2b():
    assert alignment_heads(TransformerConfig()) == HEADS_2B
    own = TransformerConfig.from_hf(
        {"lyric_alignment_layers_config": {"3": [18, 27], "1": [2]}, "num_attention_heads": 32}
    )
    assert alignment_heads(own) == {1: (2,), 3: (18, 27)}
    assert "lyric_alignment_layers_config" not in own.to_hf()
    xl = TransformerConfig(hidden_size=2560, num_attention_heads=32, num_hidden_layers=32, encoder_hidden_size=2048)
    with pytest.raises(InputError, match="lyric_alignment_layers_config.*2B"):
        alignment_heads(xl)
    with pytest.raises(InputError, match=r"heads \[18\] of layer 3.*16 heads"):
        alignment_heads(TransformerConfig(lyric_alignment_layers_config={3: [18]}))
    for value in ([1, 2], {"1": []}, {"a": [1]}, {"1": [-1]}):
        with pytest.raises(InputError, match="expected lists of heads by layer"):
            TransformerConfig(lyric_alignment_layers_config=value)
