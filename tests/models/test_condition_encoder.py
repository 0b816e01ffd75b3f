"""The condition encoder against diffusers', in float32 unless a test says otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder as TorchConditionEncoder

from acestep_jax.io import checkpoint
from acestep_jax.io.original import split_config
from acestep_jax.models.condition_encoder import SILENCE_FRAMES
from acestep_jax.models.config import ConditionEncoderConfig
from acestep_jax.models.runtime import Runtime
from tests.parity import assert_close, convert, make_pair, normal, relative_error, run_jax, run_torch

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    text_hidden_dim=24,
    timbre_hidden_dim=12,
    num_lyric_encoder_hidden_layers=4,
    num_timbre_encoder_hidden_layers=2,
)
SLIDING, FULL = "sliding_attention", "full_attention"
CASES = {
    "default": {},
    "layer_types": dict(layer_types=[FULL, SLIDING, SLIDING], num_lyric_encoder_hidden_layers=3),
    "attention_bias": dict(attention_bias=True, num_timbre_encoder_hidden_layers=1),
    "theta_eps": dict(rope_theta=100.0, rms_norm_eps=0.1, sliding_window=5, num_lyric_encoder_hidden_layers=2),
}
LYRIC, TEXT, TIMBRE = 27, 11, 41  # tokens, tokens, frames: more than two windows, and odd
RAGGED_LYRIC, RAGGED_TEXT = (27, 14, 1), (4, 11, 7)  # valid tokens of three items

# One function for all tests, so that what was compiled for one is at hand for the next.
run = jax.jit(lambda network, arrays: network(*arrays))


def pair(**changes):
    arguments = SMALL | changes
    return make_pair("condition_encoder", TorchConditionEncoder(**arguments), ConditionEncoderConfig(**arguments))


def prefix_mask(lengths, size):
    return (np.arange(size) < np.asarray(lengths)[:, None]).astype(np.int64)


def inputs(lyric=RAGGED_LYRIC, text=RAGGED_TEXT, owners=(0, 1, 2)):
    """Right-padded text and lyrics of so many valid tokens, and one reference clip for each entry of `owners`."""
    return (
        normal(len(text), TEXT, SMALL["text_hidden_dim"]),
        prefix_mask(text, TEXT),
        normal(len(lyric), LYRIC, SMALL["text_hidden_dim"], seed=1),
        prefix_mask(lyric, LYRIC),
        normal(len(owners), TIMBRE, SMALL["timbre_hidden_dim"], seed=2),
        np.asarray(owners),
    )


def assert_same_condition(ours, theirs):
    """Every item has as many valid tokens, they come first and are equal, and what is beyond them is finite."""
    (tokens, mask), (expected, expected_mask) = map(np.asarray, ours), theirs
    np.testing.assert_array_equal(mask.sum(axis=1), expected_mask.sum(axis=1))
    np.testing.assert_array_equal(mask, np.sort(mask, axis=1)[:, ::-1])
    assert np.isfinite(tokens).all()
    assert_close(tokens[mask], expected[expected_mask])


# The layers are those of the transformer, whose tests have the slow ones by default.
@pytest.mark.parametrize(
    "case",
    [
        "layer_types",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("default", "attention_bias", "theta_eps")),
    ],
)
def test_matches_torch(case):
    theirs, ours = pair(**CASES[case])
    arrays = inputs()
    found, expected = run(ours, arrays), run_torch(theirs, *arrays)
    assert found[0].shape == expected[0].shape
    assert expected[1].sum(axis=1).tolist() == [27 + 1 + 4, 14 + 1 + 11, 1 + 1 + 7]
    assert_same_condition(found, expected)


@pytest.mark.slow
def test_timbre_encoder_in_another_order():
    """As ACE-Step's own code has it: the layers of the timbre encoder follow `timbre_layer_types`."""
    theirs, ours = pair()
    arrays = inputs()
    changed = convert("condition_encoder", theirs, dataclasses.replace(ours.config, timbre_layer_types=(FULL, SLIDING)))
    theirs.timbre_encoder._layer_types = [FULL, SLIDING]
    expected = run_torch(theirs, *arrays)
    assert_same_condition(run(changed, arrays), expected)
    assert relative_error(run(ours, arrays)[0][0, LYRIC], expected[0][0, LYRIC]) > 0.01


@pytest.mark.parametrize(
    ("owners", "most", "kept"),
    [
        pytest.param((0, 0, 1), 2, [0, 1, 2], marks=pytest.mark.slow),
        ((1, 0, 1, 2, 1), 3, [0, 1, 2, 3, 4]),
        ((2,), 1, [0]),
        ((0, 1, 2), 3, [0, 1, 2]),
        ((0, 0, 1, 2, 2), 1, [0, 2, 3]),
    ],
    ids=["two_and_one", "in_any_order", "only_the_last_item", "spare_slots", "too_many"],
)
def test_references_go_to_their_items(owners, most, kept):
    theirs, ours = pair(num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1)
    items = max(owners) + 1
    arrays = inputs(RAGGED_LYRIC[:items], RAGGED_TEXT[:items], owners)
    found = run_jax(ours, *arrays, max_references=most)
    *rest, clips, owners = arrays
    assert found[0].shape == (items, LYRIC + most + TEXT, 32)
    assert_same_condition(found, run_torch(theirs, *rest, clips[kept], owners[kept]))


def test_without_padding_the_order_is_lyric_timbre_text():
    theirs, ours = pair()
    arrays = inputs((LYRIC,) * 3, (TEXT,) * 3)
    tokens, mask = run(ours, arrays)
    assert mask.all()
    assert_close(tokens, run_torch(theirs, *arrays)[0])
    lyric = run_torch(theirs.lyric_encoder, *arrays[2:4])
    timbre = run_torch(theirs.timbre_encoder, *arrays[4:])[0]
    text = run_torch(theirs.text_projector, arrays[0])
    assert_close(tokens, np.concatenate([lyric, timbre, text], axis=1))


def test_padding_is_not_seen():
    theirs, ours = pair()
    text, text_mask, lyric, lyric_mask, *rest = arrays = inputs()
    expected = run_torch(theirs, *arrays)
    text, lyric = (np.where(m[..., None], x, np.float32(100)) for x, m in ((text, text_mask), (lyric, lyric_mask)))
    assert_same_condition(run(ours, (text, text_mask, lyric, lyric_mask, *rest)), expected)


def test_windows_of_both_encoders_bite():
    theirs, ours = pair()
    arrays = inputs()
    wide = convert("condition_encoder", theirs, dataclasses.replace(ours.config, sliding_window=TIMBRE))
    (tokens, _), (expected, _) = run(wide, arrays), run_torch(theirs, *arrays)
    for part in (slice(0, LYRIC), slice(LYRIC, LYRIC + 1)):  # of the first item: lyric tokens, timbre token
        assert relative_error(tokens[0, part], expected[0, part]) > 0.01


def test_buffers_and_tokens_are_those_of_torch():
    """Silence repeats past its end; the null condition and the unread special token come along."""
    theirs, ours = pair()
    silence = theirs.silence_latent.numpy()
    np.testing.assert_array_equal(ours.silence(750), silence[:, :750])
    np.testing.assert_array_equal(ours.silence(SILENCE_FRAMES), silence)
    long = np.concatenate([silence, silence, silence[:, :3]], axis=1)
    np.testing.assert_array_equal(ours.silence(2 * SILENCE_FRAMES + 3), long)
    np.testing.assert_array_equal(ours.null_condition_emb[...], theirs.null_condition_emb.detach().numpy())
    token = theirs.timbre_encoder.special_token.detach().numpy()
    np.testing.assert_array_equal(ours.timbre_encoder.special_token[...], token)


def test_compute_dtype_is_the_runtimes():
    model = checkpoint.abstract("condition_encoder", ConditionEncoderConfig(**SMALL), Runtime(dtype="bfloat16"))
    tokens, mask = jax.eval_shape(lambda model, arrays: model(*arrays), model, inputs())
    assert (tokens.dtype, mask.dtype) == (jnp.bfloat16, jnp.bool_)
    assert all(leaf.dtype == jnp.float32 for leaf in checkpoint.leaves(model).values())


def test_default_config_is_that_of_torch():
    with torch.device("meta"):
        theirs = dict(TorchConditionEncoder().config)
    assert ConditionEncoderConfig().to_hf() == {k: v for k, v in theirs.items() if not k.startswith("_")}


def test_a_token_of_its_own_reads_the_reference():
    """ACE-Step's way for XL models: the special token before the frames, and read out after the layers."""
    theirs, ours = pair()
    arrays = inputs()
    first = run(ours, arrays)
    xl = convert("condition_encoder", theirs, dataclasses.replace(ours.config, timbre_special_token=True))

    class Prepend(torch.nn.Module):
        def __init__(self, linear, token):
            super().__init__()
            self.linear, self.token = linear, token

        def forward(self, x):
            x = self.linear(x)
            return torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)

    encoder = theirs.timbre_encoder
    plain, encoder.embed_tokens = encoder.embed_tokens, Prepend(encoder.embed_tokens, encoder.special_token)
    try:
        expected = run_torch(theirs, *arrays)
    finally:
        encoder.embed_tokens = plain
    assert_same_condition(run(xl, arrays), expected)
    assert relative_error(first[0], expected[0]) > 1e-3


def test_models_with_a_timbre_token_are_told_by_their_size():
    """A transformer wider than its encoders makes an XL model; no layout has a key for it."""
    values = dict(hidden_size=2048, num_attention_heads=16)
    assert not split_config(values, "")["condition_encoder"].timbre_special_token
    xl = split_config(dict(values, hidden_size=2560, encoder_hidden_size=2048), "")["condition_encoder"]
    assert xl.timbre_special_token and xl.hidden_size == 2048
    assert "timbre_special_token" not in xl.to_hf()
