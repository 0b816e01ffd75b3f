"""The autoencoder against diffusers' Oobleck, windows against one piece, eight devices against one; in float32."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderOobleck as TorchAutoencoder

from acestep_jax import make_mesh
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.pretrained import fold
from acestep_jax.models import autoencoder
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.models.kernels.sine import sine
from acestep_jax.models.runtime import Runtime
from tests.parity import assert_close, make_pair, normal, relative_error, run_torch

CASES = {
    "ace_step": dict(encoder_hidden_size=8, decoder_channels=8, downsampling_ratios=[2, 4, 4, 6, 10]),
    "two_blocks": dict(
        encoder_hidden_size=8,
        decoder_channels=6,
        downsampling_ratios=[2, 4],
        channel_multiples=[2, 3],
        decoder_input_channels=4,
        audio_channels=1,
    ),
}
FRAMES = 43
ENOUGH = {"ace_step": 23, "two_blocks": FRAMES}  # odd numbers, more than twice the reach of a frame

# One function each for all tests, so that what was compiled for one is at hand for the next.
encode = jax.jit(
    lambda network, audio, tile=512, lengths=None: network.encode(audio, lengths, tile_frames=tile), static_argnums=2
)
decode = jax.jit(
    lambda network, latents, tile=512, lengths=None: network.decode(latents, lengths, tile_frames=tile),
    static_argnums=2,
)


@functools.cache
def pair(case):
    return make_pair("vae", TorchAutoencoder(**CASES[case]), AutoencoderConfig(**CASES[case]))


def audio(network, frames=FRAMES, extra=0, batch=2):
    return 0.5 * normal(batch, network.config.audio_channels, frames * network.hop_length + extra)


def latents(network, frames=FRAMES, batch=2):
    return normal(batch, frames, network.config.decoder_input_channels)


def torch_encode(theirs, x):
    """Mean and standard deviation, [B, T, C] like ours."""
    posterior = run_torch(lambda x: (lambda p: (p.mean, p.std))(theirs.encode(x).latent_dist), x)
    return tuple(value.transpose(0, 2, 1) for value in posterior)


def torch_decode(theirs, z):
    return run_torch(lambda z: theirs.decode(z.mT).sample, z)


@pytest.mark.parametrize("case", CASES)
def test_encode_matches_torch(case):
    """A third of a frame is left over."""
    theirs, ours = pair(case)
    x = audio(ours, ENOUGH[case], extra=ours.hop_length // 3)
    found, (mean, std) = encode(ours, x), torch_encode(theirs, x)
    assert found.mean.shape == found.std.shape == (2, ENOUGH[case], 4)
    assert_close(found.mean, mean)
    assert_close(found.std, std)


@pytest.mark.parametrize("case", CASES)
def test_decode_matches_torch(case):
    theirs, ours = pair(case)
    z = latents(ours, ENOUGH[case])
    found = decode(ours, z)
    assert found.shape == (2, ours.config.audio_channels, ENOUGH[case] * ours.hop_length)
    assert_close(found, torch_decode(theirs, z))


@pytest.mark.parametrize("case", CASES)
def test_reach_is_what_a_frame_depends_on(case):
    """What changes with one frame lies within the reach and fills most of it."""
    _, ours = pair(case)
    frames = ENOUGH[case]
    middle = frames // 2
    hop, config = ours.hop_length, ours.config
    z, x = latents(ours, frames), audio(ours, frames, extra=hop // 3)
    other_z, other_x = z.copy(), x.copy()
    other_z[:, middle] += 3
    other_x[:, :, middle * hop : (middle + 1) * hop] += 3
    sound = np.asarray(decode(ours, z) - decode(ours, other_z)).reshape(2, -1, frames, hop)
    mean = np.asarray(encode(ours, x).mean - encode(ours, other_x).mean)
    sound_reach, mean_reach = autoencoder._decoder_field(config), autoencoder._encoder_field(config) / hop
    for change, reach in ((sound.any(axis=(0, 1, 3)), sound_reach), (mean.any(axis=(0, 2)), math.ceil(mean_reach))):
        assert reach - 3 <= abs(np.flatnonzero(change) - middle).max() <= reach


# One frame of a window is kept; a last window that is moved back, with two of five frames; three windows of one size.
# Five blocks are windowed as two are, and take twice as long to compile.
TILES = [
    pytest.param("two_blocks", 41, 42, 0, marks=pytest.mark.slow),
    ("two_blocks", 45, 87, 7),
    pytest.param("ace_step", 21, FRAMES, 640, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "tile", "frames", "extra"), TILES)
def test_tiles_give_what_one_piece_gives(case, tile, frames, extra):
    """Quiet latents keep rounding errors well below the limit; a wrong tile is off by more than 1e-4, see below."""
    _, ours = pair(case)
    z, x = 0.3 * latents(ours, frames), audio(ours, frames, extra)
    assert_close(decode(ours, z, tile), decode(ours, z), 1e-6)
    found, whole = encode(ours, x, tile), encode(ours, x)
    assert_close(found.mean, whole.mean, 1e-6)
    assert_close(found.std, whole.std, 1e-6)


# In one piece and in tiles.
PADDED = [
    ("two_blocks", 512),
    ("two_blocks", 45),
    pytest.param("ace_step", 512, marks=pytest.mark.slow),
    pytest.param("ace_step", 21, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "tile"), PADDED)
def test_padding_changes_no_song(case, tile):
    """Whatever is in it; and each song is the one that is decoded alone, also where whole windows are padding."""
    _, ours = pair(case)
    z, lengths = 0.3 * latents(ours, batch=3), np.array([FRAMES, 30, 1], np.int32)
    padding = np.arange(FRAMES)[:, None] >= lengths[:, None, None]
    for filling in (1e3, np.nan):
        found = np.asarray(decode(ours, np.where(padding, np.float32(filling), z), tile, lengths))
        for i, length in enumerate(lengths):
            assert_close(found[i : i + 1, :, : length * ours.hop_length], decode(ours, z[i : i + 1, :length]), 1e-6)


@pytest.mark.parametrize(("case", "tile"), PADDED)
def test_padding_changes_no_posterior(case, tile):
    """Whatever is in it: of torch's own result for each song alone, also where the last window is padding only. The
    lengths are odd, with what is left of a frame, and one has just a frame."""
    theirs, ours = pair(case)
    hop = ours.hop_length
    lengths = np.array([(FRAMES - 1) * hop + hop // 2 + 1, 30 * hop - 1, hop + 3], np.int32)
    x = audio(ours, batch=3)
    padding = np.arange(x.shape[-1]) >= lengths[:, None, None]
    alone = [torch_encode(theirs, x[i : i + 1, :, :length]) for i, length in enumerate(lengths)]
    for filling in (1e3, np.nan):
        found = encode(ours, np.where(padding, np.float32(filling), x), tile, lengths)
        for i, (mean, std) in enumerate(alone):
            frames = lengths[i] // hop
            assert mean.shape[1] == frames
            assert_close(found.mean[i : i + 1, :frames], mean)
            assert_close(found.std[i : i + 1, :frames], std)


@pytest.mark.parametrize(
    ("padded", "songs"),
    [
        (True, 1),
        (True, 3),
        (False, 8),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(False, 1), (False, 3), (True, 8)]),
    ],
)
def test_decode_is_the_same_on_a_mesh(songs, padded):
    """One song is cut into windows for all devices, three into 24, eight not at all."""
    _, ours = pair("two_blocks")
    frames = 87
    z = 0.3 * latents(ours, frames, songs)
    lengths = np.linspace(frames, 50, songs).astype(np.int32) if padded else None
    with jax.set_mesh(make_mesh(data=2, tensor=2, sequence=2)):
        found = decode(ours, z, 512, lengths)
    assert len(found.sharding.device_set) == 8
    expected = decode(ours, z, 512, lengths)
    for i in range(songs):
        samples = (lengths[i] if padded else frames) * ours.hop_length
        assert_close(found[i, :, :samples], expected[i, :, :samples], 1e-6)


def test_a_song_of_ten_minutes_is_decoded_within_a_gigabyte():
    """Temporary memory of the published size in float32, beside the weights and the song itself."""
    network = checkpoint.abstract("vae", AutoencoderConfig(), Runtime())
    latents = jax.ShapeDtypeStruct((1, 15000, 64), jnp.float32)
    compiled = jax.jit(lambda network, latents: network.decode(latents)).lower(network, latents).compile()
    assert 1e8 < compiled.memory_analysis().temp_size_in_bytes < 1e9


def test_a_mesh_shares_the_windows():
    """As many for every device, and as large as they need to be, no larger."""
    windows = autoencoder._Windows.of(87, 512, 20, 8)
    assert (windows.count, windows.step, windows.size) == (8, 11, 51)
    windows = autoencoder._Windows.of(15000, 512, 11, 8)
    assert windows.count % 8 == 0 and windows.size <= 512 and windows.count * windows.step >= 15000


def test_sine():
    """Its square, which is all that the snake needs, near zero, at its zeros and far from both."""
    zeros = np.arange(-30000, 30001, 7) * np.pi
    x = np.concatenate([np.linspace(-1e5, 1e5, 1_000_003), np.linspace(-7, 7, 100_001), zeros, zeros + np.pi / 2])
    x = x[abs(x) <= 1e5].astype(np.float32)
    error = np.abs(np.square(np.asarray(jax.jit(sine)(x), np.float64)) - np.sin(x.astype(np.float64)) ** 2)
    assert error.max() <= 5e-7, x[error.argmax()]


def test_too_small_an_overlap_would_be_seen(monkeypatch):
    _, ours = pair("two_blocks")
    z, x = latents(ours, 87), audio(ours, 87, 7)
    monkeypatch.setattr(autoencoder, "_decoder_field", lambda config: 1)
    monkeypatch.setattr(autoencoder, "_encoder_field", lambda config: 1)
    # Compiled here, because `run_jax` would keep these programs for other tests.
    decoded = jax.jit(lambda network, z: network.decode(z, tile_frames=45))(ours, z)
    encoded = jax.jit(lambda network, x: network.encode(x, tile_frames=45))(ours, x)
    assert relative_error(decoded, decode(ours, z)) > 1e-4
    assert relative_error(encoded.mean, encode(ours, x).mean) > 1e-4


def test_batch_gives_what_single_items_give():
    _, ours = pair("two_blocks")
    z, x = latents(ours), audio(ours, extra=2)
    for i in range(2):
        assert_close(decode(ours, z[i : i + 1]), decode(ours, z)[i : i + 1], 1e-6)
        assert_close(encode(ours, x[i : i + 1]).mean, encode(ours, x).mean[i : i + 1], 1e-6)


def test_sample_is_mean_and_noise():
    _, ours = pair("two_blocks")
    posterior = encode(ours, audio(ours, extra=2))
    key, other = jax.random.split(jax.random.key(0))
    noise = (posterior.sample(key) - posterior.mean) / posterior.std
    assert_close(noise, jax.random.normal(key, posterior.mean.shape))
    assert np.all(posterior.sample(key) != posterior.sample(other))


def test_fold_is_the_weight_norm_of_torch():
    """Of every convolution, transposed ones included: their norm runs over output channels and taps."""
    theirs, _ = pair("ace_step")
    folded = 0
    for module in theirs.modules():
        for hook in module._forward_pre_hooks.values():
            g, v = module.weight_g.detach().numpy(), module.weight_v.detach().numpy()
            assert_close(fold(g, v), hook.compute_weight(module).detach().numpy(), 3e-7)
            folded += 1
    assert folded == 2 * 5 * (3 * 2 + 1) + 4


def test_audio_shorter_than_a_frame_is_refused():
    _, ours = pair("two_blocks")
    with pytest.raises(InputError, match="7 samples .* frame of 8"):
        ours.encode(np.zeros((1, 1, 7), np.float32))
    assert jax.eval_shape(encode, ours, np.zeros((1, 1, 8), np.float32)).mean.shape == (1, 1, 4)


def test_tiles_without_room_between_overlaps_are_refused():
    _, ours = pair("two_blocks")
    with pytest.raises(InputError, match="tile_frames: 40 leaves nothing"):
        ours.decode(latents(ours, 41), tile_frames=40)
    with pytest.raises(InputError, match="tile_frames: 38 leaves nothing"):
        ours.encode(audio(ours, 41), tile_frames=38)
    assert ours.config.audio_channels == jax.eval_shape(decode, ours, latents(ours, 40), 40).shape[1]


SMALL = dict(
    encoder_hidden_size=8, encoder_channels=6, decoder_channels=6, downsampling_ratios=[2, 4], channel_multiples=[2, 3]
)


@functools.cache
def patched():
    """Patches of three samples, and the same network on what they hold side by side."""
    sizes = SMALL | dict(decoder_input_channels=4)
    ours = checkpoint.abstract("vae", AutoencoderConfig(**sizes, patch_size=3, audio_channels=2))
    arrays = {name: 0.1 * normal(*v.shape, seed=i) for i, (name, v) in enumerate(checkpoint.leaves(ours).items())}
    plain = checkpoint.abstract("vae", AutoencoderConfig(**sizes, audio_channels=6))
    return checkpoint.assemble(ours, arrays), checkpoint.assemble(plain, arrays)


def test_patches_are_channels():
    """What is left of a patch does not count."""
    ours, plain = patched()
    assert ours.hop_length == 3 * plain.hop_length == 24
    x, z = audio(ours, extra=2), latents(ours)
    side_by_side = x[:, :, : FRAMES * 24].reshape(2, 2, -1, 3).transpose(0, 3, 1, 2).reshape(2, 6, -1)
    assert_close(encode(ours, x).mean, encode(plain, side_by_side).mean, 1e-6)
    sound = np.asarray(decode(plain, z)).reshape(2, 3, 2, -1).transpose(0, 2, 3, 1).reshape(2, 2, -1)
    assert_close(decode(ours, z), sound, 1e-6)


@pytest.mark.slow
def test_patches_in_tiles_and_padding():
    ours, _ = patched()
    z, x = latents(ours, 87), audio(ours, 87, 7)
    assert_close(decode(ours, z, 45), decode(ours, z), 1e-6)
    assert_close(encode(ours, x, 45).mean, encode(ours, x).mean, 1e-6)
    length = 50 * ours.hop_length + 5
    padded = np.where(np.arange(x.shape[-1]) < length, x, np.nan)
    found = encode(ours, padded, 45, np.array([length] * 2, np.int32)).mean[:, :50]
    assert_close(found, encode(ours, x[:, :, :length], 45).mean, 1e-6)
    found = decode(ours, z, 45, np.array([50] * 2, np.int32))[:, :, : 50 * ours.hop_length]
    assert_close(found, decode(ours, z[:, :50], 45), 1e-6)


def test_config_and_dtype():
    """The keys are torch's, what is not supported is refused, and a bfloat16 runtime computes in bfloat16."""
    with torch.device("meta"):
        theirs = {key: value for key, value in TorchAutoencoder().config.items() if not key.startswith("_")}
    assert AutoencoderConfig.from_hf(theirs).to_hf() == theirs
    for wrong in (dict(downsampling_ratios=[2, 3, 4, 6, 10]), dict(channel_multiples=[1, 2])):
        with pytest.raises(InputError, match="AutoencoderConfig.*downsampling_ratios"):
            AutoencoderConfig(**wrong)
    network = checkpoint.abstract("vae", AutoencoderConfig(**CASES["two_blocks"]), Runtime(dtype="bfloat16"))
    for tile in (60, 45):
        y = jax.eval_shape(lambda n, tile=tile: n.decode(jnp.zeros((1, 50, 4)), tile_frames=tile), network)
        posterior = jax.eval_shape(lambda n, tile=tile: n.encode(jnp.zeros((1, 1, 400)), tile_frames=tile), network)
        assert y.dtype == jnp.float32 and posterior.mean.dtype == posterior.std.dtype == jnp.bfloat16
