"""A seed gives the same song, and a run the same weights, whatever JAX's process-wide settings are."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from acestep_jax import AceStepPipeline, Request, Sampling
from acestep_jax.diffusion import noise
from acestep_jax.io import checkpoint
from acestep_jax.settings import own_settings
from acestep_jax.train import autoencoder
from acestep_jax.train.data_folder import read_records
from acestep_jax.train.finetune import fit
from acestep_jax.train.preprocess import preprocess
from tests.parity import normal
from tests.training import SMALL, autoencoder_settings, settings, write_songs

SETTINGS = {
    "rbg": dict(jax_default_prng_impl="rbg"),
    "unsafe_rbg": dict(jax_default_prng_impl="unsafe_rbg"),
    "64 bits": dict(jax_enable_x64=True),
    "not partitionable": dict(jax_threefry_partitionable=False),
    "strict dtypes": dict(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise"),
    "seeds moved": dict(jax_random_seed_offset=7),
    "all": dict(jax_default_prng_impl="rbg", jax_enable_x64=True, jax_threefry_partitionable=False),
}


@contextlib.contextmanager
def process_wide(values):
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def songs(path, seeds=(3, 4)):
    """A batch of two, with a solver that draws noise at each step."""
    pipe = AceStepPipeline.from_pretrained(path)
    requests = [Request(f"song {seed}", audio_duration=10.0, seed=seed) for seed in seeds]
    made = pipe.run([pipe.prepare(request) for request in requests], Sampling(2, solver="sde"))
    return [(song.latents, song.audio) for song in made]


@pytest.fixture(scope="module")
def expected(tiny):
    return songs(tiny[1])


# "all" is three of the others at once, one at a time tells which; keys of another generator are made anew whichever it
# is, see `test_a_key_of_any_generator_gives_one_song_in_any_batch`.
@pytest.mark.parametrize(
    "case",
    [
        case if case in ("strict dtypes", "seeds moved", "all") else pytest.param(case, marks=pytest.mark.slow)
        for case in SETTINGS
    ],
)
def test_songs_are_equal_bit_for_bit(tiny, expected, case):
    with process_wide(SETTINGS[case]):
        found = songs(tiny[1])
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_a_key_of_any_generator_gives_one_song_in_any_batch(kind):
    keys = [noise.own_key(jax.random.key(seed, impl=kind)) for seed in (0, 1)]
    together = noise.normal(jnp.stack(keys), (3, 4))
    for key, drawn in zip(keys, together, strict=True):
        np.testing.assert_array_equal(noise.normal(key[None], (3, 4))[0], drawn)
    assert not np.array_equal(*together)


@pytest.mark.unit
def test_the_settings_of_the_process_stay():
    with process_wide(SETTINGS["all"]):
        with own_settings():
            assert jnp.arange(3).dtype == jnp.int32 and jax.random.key_impl(jax.random.key(0)) == "threefry2x32"
        assert jnp.arange(3).dtype == jnp.int64 and jax.random.key_impl(jax.random.key(0)) == "rbg"


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "songs"
    write_songs(folder, tiny[1])
    return folder


@pytest.fixture(scope="module")
def trained(tiny, data, tmp_path_factory):
    return _weights(tiny[1], data, tmp_path_factory.mktemp("run") / "run")


def _weights(native, data, out):
    return load_file(fit(settings(data, native, out, save_every=6, **SMALL)) / "adapter.safetensors")


# By default songs are equal; what training draws has the same keys.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["all", "rbg", "64 bits", "not partitionable"])
def test_training_is_equal_bit_for_bit(tiny, data, trained, tmp_path, case):
    with process_wide(SETTINGS[case]):
        found = _weights(tiny[1], data, tmp_path / "run")
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(found[name], value)


# What draws or computes outside of a song and of the transformer's training.


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two files of two seconds, with captions."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(2):
        soundfile.write(folder / f"{i}.wav", 0.1 * normal(2 * 48_000, 2, seed=i), 48_000)
        (folder / f"{i}.caption.txt").write_text(f"song {i}")
    return folder


def _preprocessed(sounds, native, folder):
    index = preprocess(sounds, folder, checkpoint=native)
    return index, [list(read_records(folder / song.shard, [song.row])) for song in index.songs]


def _autoencoder(sounds, out):
    folder = autoencoder.fit(autoencoder_settings(sounds, out, steps=2, save_every=2))
    (network,) = checkpoint.load(folder, names=["vae"]).values()
    return {name: np.asarray(variable[...]) for name, variable in checkpoint.leaves(network).items()}


@pytest.fixture(scope="module")
def preprocessed(tiny, sounds, tmp_path_factory):
    return _preprocessed(sounds, tiny[1], tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def trained_autoencoder(sounds, tmp_path_factory):
    return _autoencoder(sounds, tmp_path_factory.mktemp("run") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rbg", "64 bits", "not partitionable"])
def test_preprocessing_is_equal_bit_for_bit(tiny, sounds, preprocessed, tmp_path, case):
    with process_wide(SETTINGS[case]):
        index, records = _preprocessed(sounds, tiny[1], tmp_path / "data")
    assert index == preprocessed[0]
    jax.tree.map(np.testing.assert_array_equal, records, preprocessed[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rbg", "64 bits", "not partitionable"])
def test_training_of_an_autoencoder_is_equal_bit_for_bit(sounds, trained_autoencoder, tmp_path, case):
    with process_wide(SETTINGS[case]):
        found = _autoencoder(sounds, tmp_path / "run")
    assert found.keys() == trained_autoencoder.keys()
    for name, value in trained_autoencoder.items():
        np.testing.assert_array_equal(found[name], value)
