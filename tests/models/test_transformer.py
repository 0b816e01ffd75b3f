"""The diffusion transformer against diffusers', in float32 unless a test says otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AceStepTransformer1DModel as TorchTransformer
from flax import nnx

from acestep_jax.io import checkpoint
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.layers import RMSNorm
from acestep_jax.models.runtime import Runtime
from acestep_jax.models.scan import period
from acestep_jax.models.transformer import AceStepTransformer1DModel
from tests.parity import as_torch, assert_close, convert, make_pair, normal, relative_error, run_jax, run_torch

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
)
SLIDING, FULL = "sliding_attention", "full_attention"
BFLOAT16 = dict(dtype="bfloat16", param_dtype="bfloat16")

CASES = {
    "default": {},
    "xl": dict(num_attention_heads=8, encoder_hidden_size=24, is_turbo=True, model_version="turbo"),
    "attention_bias": dict(attention_bias=True),
    "aperiodic": dict(layer_types=[FULL, SLIDING, SLIDING, FULL]),
    "all_sliding": dict(layer_types=[SLIDING] * 4),
    "all_full": dict(layer_types=[FULL] * 4),
    "odd_layers": dict(num_hidden_layers=3),
    "patch_size_1": dict(patch_size=1, layer_types=[SLIDING] * 4),
    "patch_size_4": dict(patch_size=4),
    "multi_head": dict(num_key_value_heads=4),
    "latents": dict(in_channels=24, audio_acoustic_hidden_dim=8),
    "everything": dict(num_attention_heads=8, encoder_hidden_size=24, attention_bias=True, patch_size=4)
    | dict(rope_theta=100.0, rms_norm_eps=0.1, sliding_window=5),
    "theta_eps": dict(rope_theta=100.0, rms_norm_eps=0.1, sliding_window=5),
}


# Each of these is also a part of "everything" or of "patch_size_1", or one kind of layer of "aperiodic"; heads that
# share no keys are in `test_attention.py`, other channels in every comparison of songs.
SLOW_CASES = "xl attention_bias all_sliding all_full patch_size_4 multi_head latents theta_eps".split()


def pair(**changes):
    arguments = SMALL | changes
    return make_pair("transformer", TorchTransformer(**arguments), TransformerConfig(**arguments))


def inputs(config, batch=2, frames=101, tokens=7):
    """An odd number of frames, more than twice the window in tokens, t != r, another number of condition tokens."""
    condition = config.encoder_hidden_size or config.hidden_size
    latent = config.audio_acoustic_hidden_dim
    t = np.linspace(0.9, 0.3, batch, dtype=np.float32)
    return (
        normal(batch, frames, latent),
        t,
        t / 3,
        normal(batch, tokens, condition, seed=1),
        normal(batch, frames, config.in_channels - latent, seed=2),
    )


def torch_velocity(model, *arrays):
    return run_torch(model, *arrays, return_dict=False)[0]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_CASES)) for case in CASES]
)
def test_matches_torch(case):
    theirs, ours = pair(**CASES[case])
    arrays = inputs(ours.config)
    assert_close(run_jax(ours, *arrays), torch_velocity(theirs, *arrays))


def test_default_config_is_that_of_torch():
    with torch.device("meta"):
        theirs = dict(TorchTransformer().config)
    theirs = {key: value for key, value in theirs.items() if not key.startswith("_")}
    assert TransformerConfig().to_hf() == theirs


def test_inputs_would_show_a_wrong_model():
    """The window bites, and both timesteps, the order of the modulations and odd lengths matter."""
    theirs, ours = pair()
    arrays = inputs(ours.config)
    reference = torch_velocity(theirs, *arrays)
    everything = dataclasses.replace(ours.config, layer_types=(FULL,) * 4)
    assert relative_error(run_jax(convert("transformer", theirs, everything), *arrays), reference) > 0.01
    x, t, r, condition, context = arrays
    assert relative_error(run_jax(ours, x, t, t, condition, context), reference) > 0.01
    swapped = theirs.layers[1].scale_shift_table
    with torch.no_grad():
        swapped.copy_(swapped[:, [1, 0, 2, 3, 4, 5]].clone())
    assert relative_error(run_jax(ours, *arrays), torch_velocity(theirs, *arrays)) > 0.01


def test_condition_computed_once_is_the_same():
    _, ours = pair()
    x, t, r, condition, context = inputs(ours.config)
    keys_values = jax.jit(lambda model, c: model.embed_condition(c))(ours, condition)
    assert keys_values.keys.shape == (4, 2, 7, 2, 8)
    assert_close(run_jax(ours, x, t, r, keys_values, context), run_jax(ours, x, t, r, condition, context), 1e-6)


def test_masked_condition_tokens_have_no_effect():
    _, ours = pair()
    x, t, r, condition, context = inputs(ours.config)
    padded = np.concatenate([condition, 100 * normal(2, 5, 32)], axis=1)
    expected = run_jax(ours, x, t, r, condition, context)
    run = jax.jit(lambda model, *inputs: model(*inputs, encoder_lengths=np.full(2, 7)))
    assert_close(run(ours, x, t, r, padded, context), expected, 1e-6)


# Patches of four frames, which no published model has, pad as those of two do.
@pytest.mark.parametrize(
    ("case", "frames"),
    [
        pytest.param("everything", 90, marks=pytest.mark.slow),
        ("default", 101),  # whose program `test_matches_torch` has
        pytest.param("default", 91, marks=pytest.mark.slow),
        pytest.param("default", 90, marks=pytest.mark.slow),
        pytest.param("everything", 91, marks=pytest.mark.slow),
    ],
)
def test_padded_frames_have_no_effect(case, frames):
    """A bucket of 128 frames gives what the song alone gives, whatever the padding, and zeros after it; odd too."""
    _, ours = pair(**CASES[case])
    x, t, r, condition, context = inputs(ours.config, frames=frames)
    expected = run_jax(ours, x, t, r, condition, context)
    padded = [np.concatenate([a, 100 * normal(2, 128 - frames, a.shape[2])], axis=1) for a in (x, context)]
    run = jax.jit(lambda model, x, context: model(x, t, r, condition, context, lengths=np.full(2, frames)))
    found = run(ours, *padded)
    assert_close(found[:, :frames], expected, 1e-6)
    assert not found[:, frames:].any()


# By default `test_full_step_matches_torch` compares a step, which has all gradients.
@pytest.mark.slow
@pytest.mark.parametrize("case, remat", [("default", "none"), ("default", "dots"), ("everything", "full")])
def test_gradients_match_torch(case, remat):
    """Every parameter, whatever the backward pass recomputes."""
    theirs, ours = pair(**CASES[case])
    config = ours.config
    ours = convert("transformer", theirs, config, remat=remat)
    arrays = inputs(config, frames=51)
    target = normal(2, 51, config.audio_acoustic_hidden_dim, seed=3)

    torch.mean((theirs(*map(as_torch, arrays), return_dict=False)[0] - as_torch(target)) ** 2).backward()
    reference = TorchTransformer(**dict(theirs.config)).eval()
    with torch.no_grad():
        for value, source in zip(reference.parameters(), theirs.parameters(), strict=True):
            value.copy_(source.grad)
    expected = checkpoint.leaves(convert("transformer", reference, config))

    gradients = jax.jit(jax.grad(lambda model: jnp.mean((model(*arrays) - target) ** 2)))(ours)
    found = checkpoint.leaves(gradients)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(found[name][...], value[...])
        assert error <= 1e-4, f"{name}: {error:.2e}"


def test_bfloat16_is_no_worse_than_torch():
    theirs, ours = pair(num_hidden_layers=8, hidden_size=128, intermediate_size=256, head_dim=32)
    arrays = inputs(ours.config, frames=201)
    exact = torch_velocity(theirs, *arrays)
    half = theirs.to(torch.bfloat16)
    low = [as_torch(array).to(torch.bfloat16) for array in arrays]
    with torch.no_grad():
        torch_half = half(*low, return_dict=False)[0].float().numpy()
    ours = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), convert("transformer", half.float(), ours.config, **BFLOAT16)
    )
    found = np.asarray(run_jax(ours, *arrays).astype(jnp.float32))
    rms = lambda x: np.sqrt(np.mean((x - exact) ** 2))  # noqa: E731
    assert 0 < rms(found) <= 1.5 * rms(torch_half)


def test_rms_norm_is_bit_equal_in_bfloat16():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, scale = normal(4, 512), normal(512, seed=1)
    theirs = Qwen3RMSNorm(512).to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(as_torch(scale))
        want = theirs(as_torch(x).to(torch.bfloat16)).float().numpy()
    ours = RMSNorm(512, 1e-6, Runtime(**BFLOAT16))
    ours.scale[...] = jnp.asarray(scale, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(ours(jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32)), want)


def test_compute_and_parameter_dtypes_are_the_runtimes():
    config, runtime = TransformerConfig(**SMALL), Runtime(dtype="bfloat16", param_dtype="float32")
    model = jax.eval_shape(lambda: AceStepTransformer1DModel(config, runtime=runtime, rngs=nnx.Rngs(0)))
    assert model.config == config and model.runtime == runtime
    assert all(v.dtype == jnp.float32 for v in checkpoint.leaves(model).values())
    run = lambda model, *arrays: model(*arrays)  # noqa: E731
    assert jax.eval_shape(run, model, *inputs(config)).dtype == jnp.bfloat16


@pytest.mark.slow
def test_attention_dropout_acts_only_in_training():
    _, ours = pair(attention_dropout=0.5)
    arrays = inputs(ours.config)
    plain = run_jax(ours, *arrays)
    run = jax.jit(lambda network, key: network(*arrays, dropout_key=key))
    first, again, other = (run(ours, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert relative_error(first, plain) > 0.01 and relative_error(other, first) > 0.01


def test_no_layer_makes_a_square_of_scores():
    """Of 3000 tokens, neither kind of layer materialises [T, T]."""
    config = TransformerConfig(**SMALL)
    model = checkpoint.abstract("transformer", config)
    text = jax.jit(lambda m, *a: m(*a)).lower(model, *inputs(config, batch=1, frames=6000)).compile().as_text()
    assert "3000,3000" not in text


def test_every_parameter_has_logical_axes():
    model = checkpoint.abstract("transformer", TransformerConfig(**SMALL))
    for name, variable in checkpoint.leaves(model).items():
        axes = variable.get_metadata("out_sharding")
        assert len(axes) == variable.ndim, name
        assert (axes[0] == "layers") == name.startswith("layers."), name


def test_period_of_a_pattern():
    assert period((8, None) * 12) == 2
    assert period((None,) * 5) == 1
    assert period((None, 8, 8, None)) == 4
    assert period((8, None, 8)) == 3


@pytest.mark.slow  # 30 s and more than 3 GB
def test_2b_width():
    """2048 wide, 4 layers, 3001 frames, t != r: the limit of the project for a whole transformer."""
    arguments = dict(num_hidden_layers=4)
    theirs, ours = make_pair("transformer", TorchTransformer(**arguments), TransformerConfig(**arguments))
    arrays = inputs(ours.config, batch=1, frames=3001, tokens=97)
    assert_close(run_jax(ours, *arrays), torch_velocity(theirs, *arrays), 2e-5)


def test_a_missing_timestep_is_an_error():
    config = TransformerConfig(**SMALL)
    model = checkpoint.abstract("transformer", config)
    x, t, _, condition, context = inputs(config)
    with pytest.raises(ValueError, match="timestep_r: expected an array"):
        model(x, t, None, condition, context)
