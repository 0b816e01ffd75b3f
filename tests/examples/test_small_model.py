"""The model that comes with the package, and the parts of its making that `train` does not have."""

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx

from acestep_jax import AceStepPipeline, cli
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.config import AutoencoderConfig, TextEncoderConfig
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.registry import FAMILY
from examples.small_model.__main__ import main
from examples.small_model.pack import read_as_nearest
from examples.small_model.requests import facts, song_and_prompt
from examples.small_model.start import TEXT_ENCODER, silence
from examples.small_model.text_encoder import train_text_encoder
from examples.small_model.tokenizer import train_tokenizer
from examples.synthetic_music.caption import request
from examples.synthetic_music.compose import compose
from examples.synthetic_music.synth import SAMPLE_RATE, render
from examples.synthetic_music.theory import parse_key

VAE = AutoencoderConfig(patch_size=40, downsampling_ratios=(8, 6), channel_multiples=(1, 2), decoder_channels=8)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((song_and_prompt(seed)[1] for seed in range(2000)), TEXT_ENCODER.vocab_size)


def save(folder, network, name, tokenizer=None):
    arrays = [(f"{name}.{leaf}", np.asarray(v.get_value())) for leaf, v in checkpoint.leaves(network).items()]
    checkpoint_writer.save(folder, {name: network.config}, arrays, tokenizer and tokenizer.to_str(), {})


@pytest.mark.unit
def test_the_package_holds_a_whole_model_of_20_mb():
    files = [file for file in checkpoint.SMALL_MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    manifest = checkpoint.read_manifest(checkpoint.SMALL_MODEL)
    assert set(manifest.configs) == set(FAMILY.networks)
    assert manifest.configs["vae"].sampling_rate == 48000 and manifest.configs["vae"].hop_length == 1920
    assert manifest.sampling == {"num_inference_steps": 50, "guidance_scale": 3.0, "shift": 1.0}
    assert manifest.dtypes == dict.fromkeys(FAMILY.networks, "float32")


@pytest.mark.unit
def test_words_of_the_shipped_tokenizer_are_whole():
    tokenizer = checkpoint.load_tokenizer(checkpoint.SMALL_MODEL)
    for seed in range(1_000_000, 1_000_100):
        text = request(seed).caption
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert len(ids) < 1.6 * len(text.split()) + 8


def test_generates_by_default(tmp_path, capsys):
    out = tmp_path / "song.wav"
    assert cli.main(["generate", "lofi piano, 80 bpm", "--duration", "10", "--steps", "1", "--out", str(out)]) == 0
    song, rate = soundfile.read(out)
    assert rate == SAMPLE_RATE and song.shape == (480_000, 2) and 0.1 < np.abs(song).max() <= 1


def test_the_autoencoder_restores_a_song():
    """Two seconds that it was not trained on, by the correlation of samples; with its latents out of order, no song."""
    (vae,) = checkpoint.load(checkpoint.SMALL_MODEL, names=["vae"]).values()
    song = render(compose(1_000_000, 2.0), 2.0).astype(np.float32)[None]
    restore = jax.jit(lambda vae, x, order: vae.decode(vae.encode(x).mean[:, :, order]))

    def correlation(order):
        return np.corrcoef(np.ravel(restore(vae, song, order)), np.ravel(song))[0, 1]

    assert correlation(np.arange(64)) > 0.9
    assert correlation(np.roll(np.arange(64), 1)) < 0.5


SEEDS = range(1_000_000, 1_000_004)  # of requests that nothing was trained on


@pytest.fixture(scope="module")
def small():
    return AceStepPipeline.from_checkpoint()


def songs(pipe, count=4):
    """Yield songs of 10 s for the requests of the first seeds, [2, samples], made in eight steps."""
    for seed in SEEDS[:count]:
        asked = request(seed)
        facts = dict(bpm=asked.bpm, keyscale=asked.keyscale, timesignature=asked.timesignature, lyrics="[Instrumental]")
        made = pipe(asked.caption, audio_duration=10.0, num_inference_steps=8, seed=seed - SEEDS[0], **facts)
        assert made.sample_rate == SAMPLE_RATE and made.audios.shape == (1, 2, 480_000)
        yield made.audios[0]


def adherence(made):
    """Return how well songs keep to the requests of SEEDS: mean fraction of the energy that lies in the seven notes of
    the requested key (chance: 0.58), and for how many songs the tempo and the presence of drums are as requested."""
    listen = pytest.importorskip("benchmarks.music_analysis", reason="listening needs librosa").listen
    judged = [(listen(song, SAMPLE_RATE), request(seed)) for song, seed in zip(made, SEEDS, strict=False)]
    key = np.mean([heard.in_key_fraction(parse_key(asked.keyscale).pitch_classes) for heard, asked in judged])
    tempo = sum(heard.has_tempo(asked.bpm) for heard, asked in judged)
    drums = sum(heard.has_drums == asked.has_drums for heard, asked in judged)
    return float(key), tempo, drums


@pytest.mark.slow  # four songs of fifty steps; `.ci/run` runs it
def test_songs_keep_to_their_requests(small):
    key, tempo, drums = adherence(songs(small))
    assert key > 0.9 and tempo >= 3 and drums == 4


def untrained(pipe, name):
    """Return a pipeline with new weights in one network."""
    networks = pipe.networks
    networks[name] = type(networks[name])(networks[name].config, rngs=nnx.Rngs(0))
    return AceStepPipeline(**networks, tokenizer=pipe.tokenizer, sampling_defaults=pipe.sampling_defaults)


def noise(pipe):
    """Yield what the autoencoder makes of noise, at full scale as songs are."""
    decode = jax.jit(type(pipe.vae).decode)
    for seed in SEEDS[:2]:
        sound = decode(pipe.vae, np.random.default_rng(seed).standard_normal((1, 250, 64), np.float32))[0]
        yield np.asarray(sound / np.abs(sound).max())


WRONG = {
    "noise": noise,
    "silence": lambda pipe: np.zeros((2, 2, 480_000), np.float32),
    "untrained transformer": lambda pipe: songs(untrained(pipe, "transformer"), 2),
    "untrained text encoder": lambda pipe: songs(untrained(pipe, "text_encoder"), 2),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * ("untrained" in case)) for case in WRONG]
)
def test_what_is_no_song_keeps_to_no_request(small, case):
    """So that the test before can fail."""
    key, _, _ = adherence(WRONG[case](small))
    assert key < 0.8


def test_prompts_and_facts():
    songs = [song_and_prompt(seed)[0] for seed in range(200)]
    known = np.stack([facts(song) for song in songs])
    assert np.isfinite(known).all() and (known.std(0) > 0).sum() > 60
    assert song_and_prompt(7)[1] == song_and_prompt(7)[1]
    texts = [song_and_prompt(seed)[1] for seed in range(200)]
    told = np.mean([f"- bpm: {song.bpm}\n" in text for song, text in zip(songs, texts, strict=True)])
    assert 0.55 < told < 0.8  # some texts say nothing of it, as users' do


def test_tokenizer_ends_and_restores_texts(tokenizer):
    for text in ("lofi piano, 80 bpm", "# Metas\n- bpm: 120\n", "Ünïcode ♫ 12.5"):
        encoding = tokenizer.encode(text)
        assert encoding.tokens[-1] == "<|endoftext|>"
        assert tokenizer.decode(encoding.ids) == text


@pytest.mark.slow
def test_text_encoder_learns(tokenizer):
    """What it has learned in the package is in `test_songs_keep_to_their_requests`."""
    config = TextEncoderConfig(
        vocab_size=TEXT_ENCODER.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_hidden_layers=1,
    )
    network, errors = train_text_encoder(config, tokenizer, steps=150, batch_size=16)
    assert errors[0] > 0.8 and np.mean(errors[-10:]) < 0.8
    assert network.config == config


@pytest.mark.slow  # of how the model was made, not of what it makes
def test_silence_is_what_the_encoder_makes_of_it():
    vae = jax.jit(lambda: AutoencoderOobleck(VAE, rngs=nnx.Rngs(0)))()
    vae.encoder.conv1.bias.set_value(np.full(vae.encoder.conv1.bias.shape, 0.1, np.float32))  # so that ends differ
    found = np.asarray(silence(vae))[0]
    encode = jax.jit(lambda vae, x: vae.encode(x).mean)
    whole = np.asarray(encode(vae, np.zeros((1, 2, 200 * VAE.hop_length), np.float32)))[0]
    np.testing.assert_allclose(found[:100], whole[:100], atol=1e-5)
    np.testing.assert_allclose(found[-100:], whole[-100:], atol=1e-5)
    assert np.abs(whole[0] - whole[100]).max() > 1e-3


def test_numbers_between_the_tempi_are_read_as_the_nearest(tokenizer):
    table = np.random.default_rng(0).standard_normal((TEXT_ENCODER.vocab_size, 4))
    found = read_as_nearest(table, tokenizer)
    row = {n: tokenizer.token_to_id(f"Ġ{n}") for n in range(10, 301)}
    for number, nearest in {80: 79, 120: 125, 119: 115, 166: 167}.items():
        np.testing.assert_array_equal(found[row[number]], table[row[nearest]])
    others = np.setdiff1d(np.arange(len(table)), [row[n] for n in range(75, 168)])
    kept = [row[n] for n in (75, 79, 88, 100, 125, 167)]
    np.testing.assert_array_equal(found[[*others, *kept]], table[[*others, *kept]])


@pytest.mark.slow
def test_start_and_pack(tmp_path, tokenizer, capsys):
    save(tmp_path / "vae", AutoencoderOobleck(VAE, rngs=nnx.Rngs(0)), "vae")
    save(tmp_path / "text", Qwen3Model(TEXT_ENCODER, rngs=nnx.Rngs(1)), "text_encoder", tokenizer)
    start = ["start", str(tmp_path / "start"), "--vae", str(tmp_path / "vae"), "--text-encoder", str(tmp_path / "text")]
    assert main(start) == 0
    assert main(["pack", str(tmp_path / "start"), str(tmp_path / "packed")]) == 0
    full, packed = (checkpoint.load(tmp_path / name) for name in ("start", "packed"))
    for name, network in full.items():
        for leaf, variable in checkpoint.leaves(network).items():
            stored = checkpoint.leaves(packed[name])[leaf].get_value()
            assert stored.dtype == "bfloat16"
            expected = np.asarray(variable.get_value())
            if leaf == "embed_tokens.embedding":
                expected = read_as_nearest(expected, tokenizer)
            np.testing.assert_array_equal(stored, expected.astype("bfloat16"))
    encoder = full["condition_encoder"]
    random = np.random.default_rng(0).standard_normal
    lyrics = encoder.lyric_encoder(random((1, 9, TEXT_ENCODER.hidden_size), np.float32), np.array([9]))
    timbre = encoder.timbre_encoder(random((1, 20, 64), np.float32))
    assert not lyrics.any() and not timbre.any()  # there is nothing to sing
    assert main(start) == 2
    assert "already exists" in capsys.readouterr().err
