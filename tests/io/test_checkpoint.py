"""The native checkpoint: what is saved is loaded, where and as what it was asked for; what is broken is named."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from acestep_jax import InputError, make_mesh
from acestep_jax.io import checkpoint, checkpoint_writer, manifest
from acestep_jax.io.manifest import Manifest, default_dtype, pick_dtype
from acestep_jax.models.config import AudioTokenDetokenizerConfig
from acestep_jax.models.registry import FAMILY
from acestep_jax.models.runtime import Runtime
from tests.folders import edit_json, native_arrays


@pytest.fixture(scope="module")
def expected(tiny):
    return native_arrays(tiny[0])


def flat(networks):
    return {f"{name}.{k}": v[...] for name, module in networks.items() for k, v in checkpoint.leaves(module).items()}


@pytest.mark.unit
def test_an_abstract_network_is_its_callers_own():
    """It is traced once; what one caller changes, another does not find."""
    config = AudioTokenDetokenizerConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    first, second = (checkpoint.abstract("audio_token_detokenizer", config) for _ in range(2))
    name, variable = next(iter(checkpoint.leaves(first).items()))
    variable.set_value(jax.ShapeDtypeStruct((1,), "int8"))
    for other in (second, checkpoint.abstract("audio_token_detokenizer", config)):
        assert checkpoint.leaves(other)[name].dtype == np.float32
    half = checkpoint.abstract("audio_token_detokenizer", config, Runtime(param_dtype="bfloat16"))
    assert checkpoint.leaves(half)[name].dtype == "bfloat16"


def test_load_gives_what_was_converted(tiny, expected):
    loaded = flat(checkpoint.load(tiny[1]))
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        assert value.devices() == {jax.devices()[0]} and value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_leaves_reach_the_host_where_jax_has_no_cpu(tiny, expected, monkeypatch):
    """As with JAX_PLATFORMS=cuda."""
    devices = jax.local_devices()

    def local_devices(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return devices

    monkeypatch.setattr(jax, "local_devices", local_devices)
    shapes = checkpoint.leaf_shapes("audio_tokenizer", checkpoint.read_manifest(tiny[1]).configs["audio_tokenizer"])
    found = checkpoint.read_leaves(tiny[1], "audio_tokenizer", shapes)
    assert all(np.array_equal(value, expected[f"audio_tokenizer.{name}"]) for name, value in found.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_casts(tiny, expected, dtype):
    networks = checkpoint.load(tiny[1], dtype=dtype, names=["audio_tokenizer"])
    assert networks.keys() == {"audio_tokenizer"}
    runtime = networks["audio_tokenizer"].runtime
    assert runtime.dtype == runtime.param_dtype == dtype
    for name, value in flat(networks).items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, expected[name].astype(value.dtype), err_msg=name)


# Tiny sizes: hidden 64, 4 heads of 16, mlp 96, text vocabulary 257.
PLACES = {
    "transformer.layers.self_attn.to_q.kernel": P(None, ("fsdp",), ("tensor",)),  # [L, embed, heads]
    "transformer.layers.self_attn.to_out.kernel": P(None, ("tensor",), ("fsdp",)),
    "transformer.layers.mlp.down_proj.kernel": P(None, ("tensor",), ("fsdp",)),
    "transformer.layers.self_attn.norm_q.scale": P(None, None),
    "text_encoder.embed_tokens.embedding": P(None, ("fsdp",)),  # 257 rows are not divided by two
    "vae.decoder.conv1.kernel": P(None, None, None),
}


def test_load_onto_a_mesh(tiny, expected):
    """Every device holds its part alone."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    loaded = flat(checkpoint.load(tiny[1], mesh=mesh))
    assert loaded.keys() == expected.keys()
    for name, spec in PLACES.items():
        assert loaded[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), loaded[name].ndim), name
    for name, value in loaded.items():
        assert isinstance(value.sharding, NamedSharding) and value.sharding.mesh == mesh
        part = value.sharding.shard_shape(value.shape)
        assert len(value.addressable_shards) == 8
        for shard in value.addressable_shards:
            assert shard.data.shape == part and shard.data.devices() == {shard.device}
            np.testing.assert_array_equal(shard.data, expected[name][shard.index], err_msg=name)
    divided = sum(value.sharding.shard_shape(value.shape) != value.shape for value in loaded.values())
    assert divided > 60


def test_save_and_load(tiny, expected, tmp_path):
    """From arrays of either library and on a mesh, with tokenizer, settings and a file of one's own."""
    networks = ["transformer", "condition_encoder", "text_encoder", "vae"]
    configs = {name: checkpoint.read_manifest(tiny[1]).configs[name] for name in networks}
    arrays = {name: value * 2 for name, value in expected.items() if name.split(".")[0] in networks}
    first, second, *_ = PLACES
    arrays[first] = jax.device_put(arrays[first], NamedSharding(make_mesh(fsdp=8), P(None, "fsdp")))
    arrays[second] = jax.numpy.asarray(arrays[second])
    text = (tiny[1] / checkpoint.TOKENIZER).read_text()
    path = tmp_path / "saved"
    extra = {"notes.txt": lambda file: file.write_text("x")}
    sampling, dtypes = {"guidance_scale": 3.0}, {"vae": "float16"}
    checkpoint_writer.save(path, configs, arrays.items(), text, {"a": 1}, extra, sampling=sampling, dtypes=dtypes)
    assert checkpoint.read_manifest(path) == Manifest(configs, {"a": 1}, sampling, dtypes)
    for name, value in flat(checkpoint.load(path)).items():
        np.testing.assert_array_equal(value, arrays[name], err_msg=name)
    assert checkpoint.load_tokenizer(path).encode("hello").ids == checkpoint.load_tokenizer(tiny[1]).encode("hello").ids
    assert (path / "notes.txt").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"] and path.stat().st_mode & 0o777 == 0o755

    with pytest.raises(InputError, match="already exists"):
        checkpoint_writer.save(path, configs, arrays.items(), text, {})
    dropped, *rest = arrays.items()
    with pytest.raises(KeyError, match=dropped[0]):
        checkpoint_writer.save(tmp_path / "half", configs, rest, text, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def edit_config(folder, edit):
    """Apply `edit` to what config.json of a checkpoint holds."""
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))


def as_version_1(values):
    """What version 1 of the format said of the same networks."""
    values["format_version"] = 1
    for name in FAMILY.networks:
        values[name] |= dict(dtype="float32", param_dtype="bfloat16", remat="none", attention_kernel="auto")
    values["vae"]["dtype"] = "bfloat16"


def test_version_1_reads(tiny, tmp_path):
    """Of its runtime, only the dtype of the computation counts: in it the network computes unless told otherwise."""
    old = tmp_path / "old"
    shutil.copytree(tiny[1], old)
    edit_config(old, as_version_1)
    first, second = checkpoint.read_manifest(tiny[1]), checkpoint.read_manifest(old)
    assert first.configs == second.configs and not first.dtypes
    assert second.dtypes == dict.fromkeys(FAMILY.networks, "float32") | {"vae": "bfloat16"}
    networks = checkpoint.load(old, names=["vae", "text_encoder"])
    assert {name: network.runtime.dtype for name, network in networks.items()} == {
        "vae": "bfloat16",
        "text_encoder": "float32",
    }
    again = checkpoint.load(tiny[1], names=["vae", "text_encoder"])
    for (name, value), other in zip(flat(networks).items(), flat(again).values(), strict=True):
        assert value.dtype == other.dtype
        np.testing.assert_array_equal(value, other, err_msg=name)


def test_a_changed_copy_keeps_what_the_checkpoint_says(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny[1], source)
    sampling, dtypes = {"num_inference_steps": 20, "shift": 2.5}, {"text_encoder": "bfloat16"}
    edit_config(source, lambda values: values.update(sampling=sampling, dtypes=dtypes))
    checkpoint_writer.save_changed(source, tmp_path / "copy", "vae", {})
    found = checkpoint.read_manifest(tmp_path / "copy")
    assert found == checkpoint.read_manifest(source)
    assert found.sampling == sampling and found.dtypes == dtypes


def test_unless_told_otherwise_a_network_computes_in_what_most_of_its_weights_are_stored_in():
    stored = {
        "a": jax.ShapeDtypeStruct((10,), np.float32),
        "b": jax.ShapeDtypeStruct((3, 4), jax.numpy.bfloat16),
        "c": jax.ShapeDtypeStruct((1,), np.float32),
    }
    assert default_dtype(Manifest({}, {}), "vae", stored) == "bfloat16"
    assert default_dtype(Manifest({}, {}, {}, {"vae": "float16"}), "vae", stored) == "float16"
    # Nobody said so here, and activations leave the range of float16.
    assert default_dtype(Manifest({}, {}), "vae", {"a": jax.ShapeDtypeStruct((10,), np.float16)}) == "float32"


@pytest.mark.parametrize(
    "suited, declared, expected",
    [
        ("bfloat16", {}, "bfloat16"),
        ("mixed_float16", {}, "mixed_float16"),
        ("bfloat16", {"vae": "float32"}, None),
        ("float32", {"vae": "bfloat16"}, None),
        ("mixed_float16", {"vae": "float32"}, None),
        ("mixed_float16", {"vae": "bfloat16", "transformer": "float32"}, "mixed_float16"),
        ("mixed_float16", {"vae": "float16"}, "mixed_float16"),
    ],
)
def test_dtype_by_device(monkeypatch, suited, declared, expected):
    """What the checkpoint says holds, but for half precision where a GPU has no bfloat16."""
    monkeypatch.setattr(manifest, "default_precision", lambda mesh: suited)
    assert pick_dtype(Manifest({}, {}, {}, declared)) == expected


def test_load_in_the_mixed_precision(tiny, expected):
    networks = checkpoint.load(tiny[1], dtype="mixed_float16", names=["audio_tokenizer"])
    assert networks["audio_tokenizer"].runtime == Runtime.of("mixed_float16")
    for name, value in flat(networks).items():
        np.testing.assert_array_equal(value, expected[name].astype(np.float16), err_msg=name)


def test_runtime_is_given_when_weights_are_loaded(tiny):
    (network,) = checkpoint.load(
        tiny[1], dtype="bfloat16", param_dtype="float32", remat="dots", attention="xla", names=["transformer"]
    ).values()
    assert network.runtime == Runtime(dtype="bfloat16", param_dtype="float32", remat="dots", attention="xla")
    assert network.config == checkpoint.read_manifest(tiny[1]).configs["transformer"]
    with pytest.raises(InputError, match="attention: expected one of auto, .*, found 'flash'"):
        checkpoint.load(tiny[1], attention="flash", names=["transformer"])


def largest_file(folder):
    return max((file for file in (folder / "weights").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)


BROKEN = {
    "absent": (shutil.rmtree, ["made: no such folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json here", "acestep-jax convert from-torch"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json: not valid JSON"]),
    "foreign config": (
        lambda f: (f / "config.json").write_text("{}"),
        ["not of an acestep-jax checkpoint", "from-torch"],
    ),
    "newer": (lambda f: edit_json(f / "config.json", format_version=4), ["format_version 4", "reads 1 to 3", "update"]),
    "unknown network": (lambda f: edit_json(f / "config.json", foo={}), ["unknown network(s) foo"]),
    "no network": (lambda f: edit_json(f / "config.json", vae=None), ["the network(s) vae are missing"]),
    "not a network": (lambda f: edit_json(f / "config.json", vae=3), ["vae: expected a JSON object, found 3"]),
    "unknown key": (lambda f: edit_json(f / "config.json", vae={"foo": 1}), ["vae: unknown key(s) foo"]),
    "bad value": (
        lambda f: edit_json(f / "config.json", vae={"patch_size": 0}),
        ["AutoencoderConfig.patch_size: expected a positive integer, found 0"],
    ),
    "runtime": (lambda f: edit_json(f / "config.json", vae={"remat": "full"}), ["vae: unknown key(s) remat"]),
    "bad dtype": (
        lambda f: edit_json(f / "config.json", dtypes={"vae": "int8"}),
        ["dtypes: vae: 'int8' is not a dtype"],
    ),
    "dtype of nothing": (lambda f: edit_json(f / "config.json", dtypes={"foo": "float32"}), ["unknown network(s) foo"]),
    "no dtypes": (lambda f: edit_json(f / "config.json", dtypes=3), ["dtypes: expected a dtype for", "found 3"]),
    "bad dtype of version 1": (
        lambda f: edit_json(f / "config.json", format_version=1, vae={"dtype": "int8"}),
        ["vae.dtype: 'int8' is not a dtype"],
    ),
    "sampling": (lambda f: edit_json(f / "config.json", sampling=3), ["sampling: expected a JSON object, found 3"]),
    "unknown default": (
        lambda f: edit_json(f / "config.json", sampling={"steps": 8}),
        ["sampling: unknown key(s) steps; expected some of num_inference_steps, guidance_scale, shift"],
    ),
    "no steps": (
        lambda f: edit_json(f / "config.json", sampling={"num_inference_steps": 0}),
        ["sampling: num_inference_steps: expected a whole number of at least 1, found 0"],
    ),
    "half a step": (
        lambda f: edit_json(f / "config.json", sampling={"num_inference_steps": 8.5}),
        ["num_inference_steps: expected a whole number"],
    ),
    "negative guidance": (
        lambda f: edit_json(f / "config.json", sampling={"guidance_scale": -1}),
        ["sampling: guidance_scale: expected a number of at least 0, found -1"],
    ),
    "no shift": (
        lambda f: edit_json(f / "config.json", sampling={"shift": 0}),
        ["sampling: shift: expected a number above 0, found 0"],
    ),
    "leaf missing": (
        lambda f: edit_json(f / "config.json", audio_tokenizer=SMALL | {"attention_bias": True}),
        ["audio_tokenizer.attention_pooler.layers.self_attn.to_k.bias is missing", "convert the checkpoint again"],
    ),
    "leaf misshapen": (
        lambda f: edit_json(f / "config.json", audio_tokenizer=SMALL | {"num_attention_pooler_hidden_layers": 3}),
        ["has shape (2, 64)", "expected (3, 64)"],
    ),
    "leaf unknown": (
        lambda f: edit_json(f / "config.json", audio_tokenizer=None),
        ["audio_tokenizer.", "belongs to no network of the config"],
    ),
    "no weights": (lambda f: shutil.rmtree(f / "weights"), ["weights: missing or damaged", "convert"]),
    "weights cut": (lambda f: os.truncate(largest_file(f), 1000), ["weights: damaged", "convert the checkpoint again"]),
    "weights in part": (lambda f: largest_file(f).unlink(), ["weights: damaged", "convert the checkpoint again"]),
    "list of arrays damaged": (lambda f: (f / "weights/state/_METADATA").write_text("x"), ["weights: damaged"]),
    "list of chunks missing": (lambda f: (f / "weights/state/manifest.ocdbt").unlink(), ["weights: damaged"]),
}
SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    fsq_dim=64,
    audio_acoustic_hidden_dim=8,
)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(tiny, tmp_path, capfd, case):
    damage, words = BROKEN[case]
    shutil.copytree(tiny[1], tmp_path / "made")
    damage(tmp_path / "made")
    with pytest.raises(InputError) as error:
        checkpoint.load(tmp_path / "made")
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    assert not capfd.readouterr().err


def test_wrong_arguments(tiny):
    with pytest.raises(InputError, match="no config.json here.*acestep-jax convert from-torch"):
        checkpoint.load(tiny[0])
    with pytest.raises(InputError, match="dtype: 'int8' is not a dtype"):
        checkpoint.load(tiny[1], dtype="int8")
    with pytest.raises(InputError, match="native: has no foo, only transformer, "):
        checkpoint.load(tiny[1], names=["vae", "foo"])


@pytest.mark.unit
@pytest.mark.parametrize(
    "content, message", [(None, "missing"), (b"{}", "not a tokenizer"), (b"\xff", "not a tokenizer")]
)
def test_broken_tokenizer(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=f"tokenizer.json: {message}"):
        checkpoint.load_tokenizer(tmp_path)


@pytest.mark.unit
def test_large_arrays_are_batches_of_their_own():
    arrays = [("a", np.zeros(4)), ("b", np.zeros(100)), ("c", np.zeros(4))]
    assert [list(batch) for batch in checkpoint.batches(arrays, separate_from=800)] == [["b"], ["a", "c"]]
    assert [list(batch) for batch in checkpoint.batches(arrays)] == [["a", "b", "c"]]


@pytest.mark.unit
def test_shapes_do_not_depend_on_the_precision_of_the_trace():
    config = checkpoint.read_manifest(checkpoint.SMALL_MODEL).configs["transformer"]
    for kind in (None, "int8"):
        expected = checkpoint.leaf_shapes("transformer", config, kind)
        assert checkpoint.leaf_shapes("transformer", config, kind, "bfloat16") == expected
        assert checkpoint.leaf_shapes("transformer", config, kind, "mixed_float16") == expected
