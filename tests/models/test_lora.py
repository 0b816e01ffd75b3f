"""LoRA and DoRA layers, adapters as files, and adapters merged into weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from acestep_jax import InputError, make_mesh
from acestep_jax.distributed import variable_sharding
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, check_adapter, load_adapter, merge_adapters, save_adapter
from acestep_jax.models.config import LoRAConfig, TransformerConfig
from acestep_jax.models.lora import LoRALinear, add_lora, merge_loras
from tests.adapters import (
    ATTENTION,
    CONFIG,
    MLP,
    OTHERS,
    pair,
    peft_model,
    random_adapter,
    torch_adapter,
    torch_velocity,
    velocity,
)
from tests.parity import assert_close, relative_error

KINDS = {"lora": {}, "dora": dict(use_dora=True)}


def with_adapter(network, adapter):
    """The network with adapters beside its layers, as in training, and without dropout."""
    network = add_lora(network, dataclasses.replace(adapter.config, dropout=0.0), rngs=nnx.Rngs(0))
    leaves = checkpoint.leaves(network)
    assert {name for name in leaves if ".lora_" in name} == adapter.leaves.keys()
    for name, value in adapter.leaves.items():
        leaves[name][...] = jnp.asarray(value)
    return network


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])  # which is LoRA and more
def test_matches_peft_beside_and_within_the_weights(kind):
    theirs = peft_model(**KINDS[kind])
    adapter = torch_adapter(theirs, **KINDS[kind])
    reference, network = torch_velocity(theirs), pair()[1]
    assert relative_error(velocity(network), reference) > 0.1
    assert_close(velocity(with_adapter(network, adapter)), reference)
    assert_close(velocity(merge_adapters(network, [adapter], [1.0])), reference)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_new_adapters_change_nothing(kind):
    network = pair()[1]
    config = LoRAConfig(rank=4, alpha=8, dropout=0.0, targets=(*ATTENTION, *MLP, *OTHERS), **KINDS[kind])
    trainable = add_lora(network, config, rngs=nnx.Rngs(0))
    assert isinstance(trainable.layers.self_attn.to_out, LoRALinear)
    assert isinstance(network.layers.self_attn.to_out, nnx.Linear)
    assert_close(velocity(trainable), velocity(network), 1e-6)


def test_adapters_add_up():
    """In any order; a negative scale takes away what a positive one adds."""
    network = pair()[1]
    one, two = random_adapter(), random_adapter(layers=ATTENTION, rank=2, alpha=3.0, seed=1)
    both = velocity(merge_adapters(network, [one, two], [0.7, 1.5]))
    assert_close(velocity(merge_adapters(network, [two, one], [1.5, 0.7])), both, 1e-6)
    after = merge_adapters(merge_adapters(network, [one], [0.7]), [two], [1.5])
    assert_close(velocity(after), both)
    assert_close(velocity(merge_adapters(after, [two], [-1.5])), velocity(merge_adapters(network, [one], [0.7])))
    name = "layers.cross_attn.to_k"
    kernel = np.float64(checkpoint.leaves(network)[f"{name}.kernel"][...])
    for adapter, factor in ((one, 0.7 * 2.0), (two, 1.5 * 1.5)):
        kernel += factor * np.float64(adapter.leaves[f"{name}.lora_a"]) @ adapter.leaves[f"{name}.lora_b"]
    merged = merge_adapters(network, [one, two], [0.7, 1.5])
    assert_close(checkpoint.leaves(merged)[f"{name}.kernel"][...], kernel, 1e-6)


def test_scale_of_dora_goes_from_nothing_to_all():
    network, adapter = pair()[1], random_adapter(use_dora=True)
    name = "layers.self_attn.to_v.kernel"
    plain, half, full = (
        np.asarray(checkpoint.leaves(merge_adapters(network, [adapter], [k]))[name][...]) for k in (0.0, 0.5, 1.0)
    )
    assert_close(half, (plain + full) / 2, 1e-6)
    magnitude = adapter.leaves["layers.self_attn.to_v.lora_magnitude"]
    assert_close(np.linalg.norm(full, axis=1), np.abs(magnitude), 1e-6)
    two = merge_adapters(network, [adapter, adapter], [0.25, 0.75])
    assert_close(checkpoint.leaves(two)[name][...], full, 1e-6)


def test_a_scale_of_zero_changes_nothing():
    network = pair()[1]
    merged = checkpoint.leaves(merge_adapters(network, [random_adapter(use_dora=True)], [0.0]))
    for name, variable in checkpoint.leaves(network).items():
        np.testing.assert_array_equal(merged[name][...], variable[...])


def test_bfloat16_weights_are_rounded_once():
    """Three adapters that each change less than half a unit in the last place, but more together."""
    linear = nnx.Linear(2, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.ones((2, 3), jnp.bfloat16)
    network = nnx.Dict(linear=linear)
    leaves = {"linear.lora_a": np.ones((2, 1), np.float32), "linear.lora_b": np.full((1, 3), 0.003, np.float32)}
    adapters = [Adapter(LoRAConfig(rank=1, alpha=1.0), leaves)] * 3
    merged = merge_adapters(network, adapters, [1.0] * 3).linear.kernel[...]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, np.full((2, 3), 1.009, jnp.bfloat16))
    one_by_one = network
    for adapter in adapters:
        one_by_one = merge_loras(one_by_one, [(adapter.leaves, adapter.config.scaling, 1.0)])
    np.testing.assert_array_equal(one_by_one.linear.kernel[...], linear.kernel[...])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])  # the one with more leaves
def test_on_a_mesh(kind):
    """Adapters beside the weights or within them give the same, and the weights stay split as they were."""
    network, adapter = pair()[1], random_adapter(**KINDS[kind])
    merged = merge_adapters(network, [adapter], [1.0])
    reference = velocity(merged)
    mesh = make_mesh(fsdp=2, tensor=2, sequence=2)

    def place(network):
        placed = {k: jax.device_put(v[...], variable_sharding(v, mesh)) for k, v in checkpoint.leaves(network).items()}
        return checkpoint.assemble(network, placed)

    placed = place(network)
    with jax.set_mesh(mesh):
        split = merge_adapters(placed, [adapter], [1.0])
        if kind == "dora":  # the layer that computes all that the other does
            beside = place(with_adapter(network, adapter))
            b = beside.layers.mlp.up_proj.lora_b[...]
            assert b.addressable_shards[0].data.size == b.size // 2
            assert_close(velocity(beside), reference)
        else:
            assert_close(velocity(split), reference)
    for name, variable in checkpoint.leaves(placed).items():
        found = checkpoint.leaves(split)[name][...]
        assert found.sharding == variable[...].sharding and found.dtype == variable[...].dtype, name
        assert_close(found, checkpoint.leaves(merged)[name][...], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_every_bit(tmp_path, kind):
    adapter = random_adapter(alpha=0.1, **KINDS[kind])
    save_adapter(tmp_path / "adapter", adapter)
    found = load_adapter(tmp_path / "adapter")
    assert found.config == adapter.config and found.leaves.keys() == adapter.leaves.keys()
    for name, value in adapter.leaves.items():
        np.testing.assert_array_equal(found.leaves[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1  # others may read both or none
    with pytest.raises(InputError, match="already exists"):
        save_adapter(tmp_path / "adapter", adapter)


def edit_config(**changes):
    def apply(folder):
        values = json.loads((folder / "adapter.json").read_text()) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (folder / "adapter.json").write_text(json.dumps(values))

    return apply


def edit_leaves(change):
    def apply(folder):
        leaves = load_file(folder / "adapter.safetensors")
        change(leaves)
        save_file(leaves, folder / "adapter.safetensors")

    return apply


def rename(folder):
    (folder / "adapter.json").rename(folder / "adapter_config.json")


Q = "layers.self_attn.to_q"
DAMAGED = {
    "renamed": (rename, ["expected adapter.json next to adapter.safetensors"]),
    "no JSON": (lambda folder: (folder / "adapter.json").write_text("{"), ["adapter.json: not valid JSON"]),
    "a list": (lambda folder: (folder / "adapter.json").write_text("[]"), ['expected "format": "acestep-jax-lora"']),
    "format": (edit_config(format="acestep-jax"), ['adapter.json: expected "format": "acestep-jax-lora"']),
    "version": (edit_config(format_version=2), ["format_version 2, but", "reads 1"]),
    "unknown key": (edit_config(foo=1), ["adapter.json: unknown key(s) foo"]),
    "missing key": (edit_config(alpha=None), ["adapter.json: the key(s) alpha are missing"]),
    "bad value": (edit_config(rank=0), ["adapter.json: lora.rank: expected a positive integer, found 0"]),
    "wrong type": (edit_config(alpha="x"), ["adapter.json: "]),
    "no weights": (lambda folder: (folder / "adapter.safetensors").unlink(), ["adapter.safetensors: missing"]),
    "garbage": (
        lambda folder: (folder / "adapter.safetensors").write_bytes(b"garbage" * 99),
        ["adapter.safetensors: damaged"],
    ),
    "half a pair": (
        edit_leaves(lambda leaves: leaves.pop(f"{Q}.lora_b")),
        [f"{Q}.lora_b is missing", "lora_a, lora_b"],
    ),
    "unknown leaf": (
        edit_leaves(lambda leaves: leaves.update({f"{Q}.foo": np.zeros(1, np.float32)})),
        [f"unexpected tensor {Q}.foo"],
    ),
    "magnitudes": (edit_config(use_dora=True), [".lora_magnitude is missing", "a DoRA adapter"]),
    "dtype": (
        edit_leaves(lambda leaves: leaves.update({f"{Q}.lora_a": leaves[f"{Q}.lora_a"].astype(np.float16)})),
        [f"{Q}.lora_a is float16, expected float32"],
    ),
    "rank": (edit_config(rank=8), ["lora_a has shape [4, 32, 4]", "with r = 8"]),
    "depth": (
        edit_leaves(lambda leaves: leaves.update({f"{Q}.lora_b": leaves[f"{Q}.lora_b"][:3]})),
        [f"{Q}.lora_b has shape [3, 4, 32], expected [4, 4, 32]"],
    ),
    "other depth": (
        edit_leaves(lambda leaves: leaves.update({f"{Q}.{x}": leaves[f"{Q}.{x}"][:3] for x in ("lora_a", "lora_b")})),
        ["expected one number of layers"],
    ),
    "empty": (edit_leaves(lambda leaves: leaves.clear()), ["holds no adapted layer"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_bad_files(tmp_path, case):
    damage, words = DAMAGED[case]
    save_adapter(tmp_path / "adapter", random_adapter(layers=ATTENTION))
    damage(tmp_path / "adapter")
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path / "adapter")
    for word in [str(tmp_path / "adapter"), *words]:
        assert word in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(
        InputError, match="absent: no such folder or file; expected the folder or the .safetensors file of an adapter"
    ):
        load_adapter(tmp_path / "absent")
    (tmp_path / "style.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="style.safetensors: damaged or truncated"):
        load_adapter(tmp_path / "style.safetensors")


def test_saving_checks_too(tmp_path):
    adapter = random_adapter(layers=ATTENTION)
    leaves = {name: value for name, value in adapter.leaves.items() if name != f"{Q}.lora_a"}
    with pytest.raises(InputError, match=f"{Q}.lora_a is missing"):
        save_adapter(tmp_path / "adapter", Adapter(adapter.config, leaves))
    assert not list(tmp_path.iterdir())


OTHER_MODELS = {
    "wider": (dict(hidden_size=64), f"{Q}.lora_a has shape [4, 32, 4], expected [4, 64, 4]"),
    "deeper": (dict(num_hidden_layers=6), f"{Q}.lora_a has shape [4, 32, 4], expected [6, 32, 4]"),
    "more heads": (dict(num_attention_heads=8), f"{Q}.lora_b has shape [4, 4, 32], expected [4, 4, 64]"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_an_adapter_of_another_model(case):
    changes, message = OTHER_MODELS[case]
    adapter = random_adapter(layers=(Q,))
    with pytest.raises(InputError) as error:
        check_adapter(adapter, dataclasses.replace(CONFIG, **changes), "some/folder")
    assert str(error.value) == f"some/folder: {message}; the adapter is for another model"


def test_an_adapter_of_another_layer():
    adapter = random_adapter(layers=(Q,))
    leaves = {name.replace("self_attn", "lstm"): value for name, value in adapter.leaves.items()}
    with pytest.raises(InputError, match="layers.lstm.to_q is not a linear layer of this network"):
        merge_adapters(pair()[1], [Adapter(adapter.config, leaves)], [0.0])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_a_scale_is_a_number(scale):
    with pytest.raises(InputError, match="scale: expected a finite number"):
        merge_adapters(pair()[1], [random_adapter()], [scale])


def test_the_published_size():
    adapter = random_adapter(TransformerConfig(), (Q,), rank=1)
    assert adapter.leaves[f"{Q}.lora_a"].shape == (24, 2048, 1)
    check_adapter(adapter, TransformerConfig())
