"""Adapters of a pipeline: loaded beside the weights, rescaled, and removed without a trace."""

import types

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError, make_mesh
from acestep_jax.diffusion import denoise
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import load_adapter, merge_adapters, save_adapter
from tests.adapters import ATTENTION, MLP, random_adapter
from tests.parity import assert_close, relative_error

TWO = dict(bass={}, drums=dict(layers=(*ATTENTION, *MLP), rank=2, use_dora=True, seed=1))


@pytest.fixture(scope="module")
def networks(tiny):
    return checkpoint.load(tiny[1])


@pytest.fixture
def pipe(networks, tiny):
    """A pipeline of its own for each test; they share networks and programs."""
    return AceStepPipeline(**networks, tokenizer=checkpoint.load_tokenizer(tiny[1]))


@pytest.fixture(scope="module")
def folders(networks, tmp_path_factory):
    """Two adapters, in folders of their names."""
    root = tmp_path_factory.mktemp("adapters")
    for name, options in TWO.items():
        options = dict(layers=ATTENTION) | options
        save_adapter(root / name, random_adapter(networks["transformer"].config, **options))
    return [root / name for name in TWO]


def song(pipe):
    """Latents of two steps."""
    return pipe("piano", seed=0, audio_duration=10.0, num_inference_steps=2, output_type="latent").latents


def merged(pipe, folders, scales):
    """The latents of a pipeline whose weights the adapters changed."""
    networks = pipe.networks
    adapters = [load_adapter(folder) for folder in folders]
    networks["transformer"] = merge_adapters(networks["transformer"], adapters, scales)
    return song(AceStepPipeline(**networks, tokenizer=pipe.tokenizer))


def test_load_scale_and_unload(pipe, networks, folders):
    """Each state is what merged weights give; what is left in the end is the network of the beginning itself."""
    base, plain = pipe.transformer, song(pipe)
    expected = {scales: merged(pipe, folders, scales) for scales in ((1.0, 0.5), (0.0, -1.0), (1.0, 0.0))}
    assert relative_error(expected[1.0, 0.5], plain) > 0.01
    pipe.load_lora(folders, [1.0, 0.5])
    assert pipe.adapters == {"bass": 1.0, "drums": 0.5}
    assert_close(song(pipe), expected[1.0, 0.5])
    compiled = denoise.denoise._cache_size()
    pipe.set_adapters({"drums": -1})
    assert pipe.adapters == {"bass": 0.0, "drums": -1.0}
    assert_close(song(pipe), expected[0.0, -1.0])
    pipe.set_adapters({})
    assert_close(song(pipe), plain, 1e-6)
    assert denoise.denoise._cache_size() == compiled
    for name, variable in checkpoint.leaves(base).items():
        assert checkpoint.leaves(pipe.transformer)[name].get_value() is variable.get_value(), name
    pipe.set_adapters({"bass": 1.0})
    pipe.unload_lora("drums")
    assert pipe.adapters == {"bass": 1.0}
    assert_close(song(pipe), expected[1.0, 0.0])
    pipe.unload_lora()
    assert pipe.adapters == {} and pipe.transformer is base is networks["transformer"]
    np.testing.assert_array_equal(song(pipe), plain)
    pipe.unload_lora()  # there is nothing left to remove


def test_loads_add_up(pipe, folders):
    """One call or two, in any order, with the scales that the first were given since."""
    pipe.load_lora(folders[0])
    pipe.load_lora(folders[1], 0.5)
    one_by_one = pipe.transformer
    pipe.transformer = pipe._loaded.base
    pipe.load_lora([folders[1], folders[0]], [0.25, 2.0])
    pipe.set_adapters({"bass": 1.0, "drums": 0.5})
    found, expected = checkpoint.leaves(pipe.transformer), checkpoint.leaves(one_by_one)
    assert found.keys() == expected.keys()
    for name, variable in expected.items():
        if name.endswith(".lora_gain"):
            assert_close(found[name][...], variable[...], 1e-6)
        if name.endswith(".lora_scale"):  # in the order of loading
            np.testing.assert_array_equal(np.sort(found[name][...]), np.sort(variable[...]))


def test_names(pipe, folders, tmp_path):
    pipe.load_lora(folders[0], name="low")
    pipe.load_lora(folders, name=["a", "b"])
    assert list(pipe.adapters) == ["low", "a", "b"]
    pipe.unload_lora(["low", "b"])
    assert pipe.adapters == {"a": 1.0}
    adapter = random_adapter(pipe.transformer.config, ATTENTION)
    pipe.load_lora([folders[0], adapter, adapter, str(folders[0])], [0.1, 0.2, 0.3, 0.4])
    assert dict(pipe.adapters) == {"a": 1.0, "bass": 0.1, "adapter": 0.2, "adapter-2": 0.3, "bass-2": 0.4}
    assert isinstance(pipe.adapters, types.MappingProxyType)
    with pytest.raises(TypeError):
        pipe.adapters["a"] = 0.5


def test_another_transformer_has_no_adapters(pipe, folders):
    plain = pipe.transformer
    pipe.load_lora(folders)
    pipe.transformer = plain
    assert pipe.adapters == {} and pipe.transformer is plain


@pytest.mark.slow
def test_on_a_mesh(tiny, pipe, folders):
    """By default `tests/models/test_adapters.py` shows it of the network."""
    pipe.load_lora(folders, [1.0, 0.5])
    pipe.set_adapters({"bass": 0.3, "drums": 0.7})
    one = song(pipe)
    mesh = make_mesh(data=2, tensor=2, fsdp=2)
    sharded = AceStepPipeline.from_checkpoint(tiny[1], mesh=mesh)
    sharded.load_lora(folders, [1.0, 0.5])
    sharded.set_adapters({"bass": 0.3, "drums": 0.7})
    assert_close(song(sharded), one)
    factor = sharded.transformer.layers.self_attn.to_q.lora_b[...]
    assert factor.sharding.mesh == mesh and factor.addressable_shards[0].data.size == factor.size // 2


BAD = {
    "unknown": (
        lambda p, f: p.set_adapters({"bas": 1.0}),
        "adapters: 'bas' is unknown; did you mean 'bass'? loaded",
    ),
    "far": (lambda p, f: p.set_adapters({"x": 1.0}), "adapters: 'x' is unknown; loaded are bass, drums"),
    "unload": (lambda p, f: p.unload_lora(["bass", "drum"]), "adapters: 'drum' is unknown; did you mean 'drums'?"),
    "no number": (lambda p, f: p.set_adapters({"bass": "loud"}), "scales['bass']: expected a finite number"),
    "not finite": (lambda p, f: p.set_adapters({"bass": float("nan")}), "scales['bass']: expected a finite number"),
    "a number": (lambda p, f: p.set_adapters(3), "scales: expected scales by name, such as"),
    "taken": (lambda p, f: p.load_lora(f[0], name="bass"), "name: an adapter 'bass' is loaded already"),
    "twice": (lambda p, f: p.load_lora(f, name=["x", "x"]), "name: an adapter 'x' is loaded already"),
    "empty": (lambda p, f: p.load_lora(f[0], name=""), "name: expected text that is not empty, found ''"),
    "one name for two": (lambda p, f: p.load_lora(f, name="x"), "name: expected 2, one for each adapter, found 1"),
    "bad scale": (lambda p, f: p.load_lora(f[0], float("inf")), "scale: expected a finite number such as 0.8"),
}


@pytest.fixture(scope="module")
def loaded(networks, tiny, folders):
    pipe = AceStepPipeline(**networks, tokenizer=checkpoint.load_tokenizer(tiny[1]))
    pipe.load_lora(folders)
    return pipe


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(loaded, folders, case):
    act, message = BAD[case]
    before = loaded.transformer
    with pytest.raises(InputError) as error:
        act(loaded, folders)
    assert message in str(error.value)
    assert loaded.transformer is before and loaded.adapters == {"bass": 1.0, "drums": 1.0}


def test_nothing_is_loaded(pipe):
    with pytest.raises(InputError, match="adapters: 'bass' is unknown; none is loaded; use load_lora first"):
        pipe.set_adapters({"bass": 1.0})
    pipe.set_adapters({})
    pipe.load_lora([])
    assert pipe.adapters == {}
