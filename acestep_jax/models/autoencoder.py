"""Oobleck: a convolutional variational autoencoder between 48 kHz stereo audio and 25 Hz latents.

Internally, arrays are [B, time, channels]; audio inputs and outputs are [B, channels, samples].
Source: diffusers `AutoencoderOobleck`. Weight norm is folded into the kernels when a checkpoint is converted.
"""

import dataclasses
import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from acestep_jax.errors import InputError
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.models.kernels.convolution import convolve, convolve_transposed, default_tile_frames
from acestep_jax.models.kernels.sine import sine
from acestep_jax.models.layers import lecun_normal, parameter
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime

Network = TypeVar("Network", bound=nnx.Module)


class Snake(nnx.Module):
    """y = x + sin^2(a x) / (b + 1e-9) with a = exp(alpha), b = exp(beta) for each channel."""

    def __init__(self, channels: int, runtime: Runtime):
        self.alpha = parameter(jnp.zeros((channels,), runtime.param_dtype), "channels")
        self.beta = parameter(jnp.zeros((channels,), runtime.param_dtype), "channels")

    def prepared(self) -> "PreparedSnake":
        """Return the same activation with its factors computed."""
        a, b = (jnp.exp(p[...].astype(jnp.float32)) for p in (self.alpha, self.beta))
        return PreparedSnake(a, 1 / (b + 1e-9))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.prepared()(x)


class PreparedSnake(nnx.Module):
    """y = x + factor sin^2(a x), with `a` and `factor` [C] float32 for each channel."""

    def __init__(self, a: jax.Array, factor: jax.Array):
        self.a, self.factor = nnx.Variable(a), nnx.Variable(factor)

    def __call__(self, x: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        return (f + jnp.square(sine(self.a[...] * f)) * self.factor[...]).astype(x.dtype)


class Conv(nnx.Module):
    """Convolution over time, kernel [size, in, out]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        runtime: Runtime,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 0,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dilation, self.padding = stride, dilation, padding
        self.kernel = _kernel((size, inputs, outputs), runtime, rngs)
        self.bias = parameter(jnp.zeros((outputs,), runtime.param_dtype), "channels") if use_bias else None

    def __call__(self, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
        x = _zero_from(length, x)
        y = convolve(x, self.kernel[...], stride=self.stride, dilation=self.dilation, padding=self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class UpsampleConv(nnx.Module):
    """Transposed convolution: each input frame becomes `stride` samples. Kernel [2, in, stride, out]."""

    def __init__(self, inputs: int, outputs: int, stride: int, runtime: Runtime, *, rngs: nnx.Rngs):
        init = lecun_normal(in_axis=(0, 1), out_axis=(2, 3))
        value = init(rngs.params(), (2, inputs, stride, outputs), jnp.dtype(runtime.param_dtype))
        self.kernel = parameter(value, None, "channels", None, "channels")
        self.bias = parameter(jnp.zeros((outputs,), runtime.param_dtype), "channels")

    def __call__(self, x: jax.Array, length: jax.Array | None) -> jax.Array:  # [B, T, in] -> [B, T * stride, out]
        return convolve_transposed(_zero_from(length, x), self.kernel[...]) + self.bias[...].astype(x.dtype)


class OobleckResidualUnit(nnx.Module):
    """x + conv1x1(snake(conv7(snake(x))))."""

    def __init__(self, channels: int, dilation: int, runtime: Runtime, *, rngs: nnx.Rngs):
        self.snake1 = Snake(channels, runtime)
        self.conv1 = Conv(channels, channels, 7, runtime, dilation=dilation, padding=3 * dilation, rngs=rngs)
        self.snake2 = Snake(channels, runtime)
        self.conv2 = Conv(channels, channels, 1, runtime, rngs=rngs)

    def __call__(self, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x), length)))


class OobleckEncoderBlock(nnx.Module):
    """Three residual units of growing dilation, then a convolution that divides time by `stride`."""

    def __init__(self, inputs: int, outputs: int, stride: int, runtime: Runtime, *, rngs: nnx.Rngs):
        self.stride = stride
        self.res_unit1 = OobleckResidualUnit(inputs, 1, runtime, rngs=rngs)
        self.res_unit2 = OobleckResidualUnit(inputs, 3, runtime, rngs=rngs)
        self.res_unit3 = OobleckResidualUnit(inputs, 9, runtime, rngs=rngs)
        self.snake1 = Snake(inputs, runtime)
        self.conv1 = Conv(inputs, outputs, 2 * stride, runtime, stride=stride, padding=stride // 2, rngs=rngs)

    def __call__(self, x: jax.Array, length: jax.Array | None) -> jax.Array:
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            x = unit(x, length)
        return self.conv1(self.snake1(x), length)


class OobleckDecoderBlock(nnx.Module):
    """A transposed convolution that multiplies time by `stride`, then three residual units."""

    def __init__(self, inputs: int, outputs: int, stride: int, runtime: Runtime, *, rngs: nnx.Rngs):
        self.stride = stride
        self.snake1 = Snake(inputs, runtime)
        self.conv_t1 = UpsampleConv(inputs, outputs, stride, runtime, rngs=rngs)
        self.res_unit1 = OobleckResidualUnit(outputs, 1, runtime, rngs=rngs)
        self.res_unit2 = OobleckResidualUnit(outputs, 3, runtime, rngs=rngs)
        self.res_unit3 = OobleckResidualUnit(outputs, 9, runtime, rngs=rngs)

    def __call__(self, x: jax.Array, length: jax.Array | None) -> jax.Array:
        x = self.conv_t1(self.snake1(x), length)
        if length is not None:
            length = length * self.stride
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            x = unit(x, length)
        return x


class OobleckEncoder(nnx.Module):
    """[B, samples, audio channels] -> [B, samples / 1920, 2 * 64].

    length: int32, number of valid samples; later ones are read as zeros, see `OobleckDecoder`.
    """

    def __init__(self, config: AutoencoderConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        first = config.encoder_channels or config.encoder_hidden_size
        channels = [first * m for m in (1, *config.channel_multiples)]
        self.patch_size = config.patch_size
        self.conv1 = Conv(config.patch_size * config.audio_channels, channels[0], 7, runtime, padding=3, rngs=rngs)
        self.block = nnx.List(
            OobleckEncoderBlock(channels[i], channels[i + 1], stride, runtime, rngs=rngs)
            for i, stride in enumerate(config.downsampling_ratios)
        )
        self.snake1 = Snake(channels[-1], runtime)
        self.conv2 = Conv(channels[-1], config.encoder_hidden_size, 3, runtime, padding=1, rngs=rngs)

    def __call__(self, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
        if (size := self.patch_size) > 1:
            x = x[:, : x.shape[1] // size * size].reshape(x.shape[0], -1, size * x.shape[2])
            length = None if length is None else length // size
        x = self.conv1(x, length)
        for block in self.block:
            x = block(x, length)
            if length is not None:
                length = length // block.stride  # an incomplete stride is dropped, as at the end of an array
        return self.conv2(self.snake1(x), length)


class OobleckDecoder(nnx.Module):
    """[B, frames, 64] -> [B, frames * 1920, audio channels].

    length: int32, number of valid frames. Later frames are read as zeros, the padding of every convolution.
    """

    def __init__(self, config: AutoencoderConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        channels = [config.decoder_channels * m for m in (1, *config.channel_multiples)][::-1]
        self.conv1 = Conv(config.decoder_input_channels, channels[0], 7, runtime, padding=3, rngs=rngs)
        self.block = nnx.List(
            OobleckDecoderBlock(channels[i], channels[i + 1], stride, runtime, rngs=rngs)
            for i, stride in enumerate(config.downsampling_ratios[::-1])
        )
        self.snake1 = Snake(channels[-1], runtime)
        outputs = config.patch_size * config.audio_channels
        self.conv2 = Conv(channels[-1], outputs, 7, runtime, padding=3, use_bias=False, rngs=rngs)
        self.audio_channels = config.audio_channels

    def __call__(self, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
        x = self.conv1(x, length)
        for block in self.block:
            x = block(x, length)
            if length is not None:
                length = length * block.stride
        return self.conv2(self.snake1(x), length).reshape(x.shape[0], -1, self.audio_channels)


class DiagonalGaussian(NamedTuple):
    """The posterior of an encoded waveform."""

    mean: jax.Array  # [B, T, 64]
    std: jax.Array  # [B, T, 64]

    @classmethod
    def of(cls, y: jax.Array) -> "DiagonalGaussian":
        """Return the posterior for an output of the encoder, [B, T, 2 * 64]."""
        mean, scale = jnp.split(y, 2, axis=-1)
        return cls(mean, jax.nn.softplus(scale) + 1e-4)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw [B, T, 64]: mean + std * noise."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)


class AutoencoderOobleck(nnx.Module):
    """Waveform <-> latents. Long inputs are processed in overlapping windows, with the same result as in one piece."""

    def __init__(self, config: AutoencoderConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        self.config, self.runtime = config, runtime
        self.hop_length = config.hop_length  # samples in a latent frame
        self.encoder = OobleckEncoder(config, runtime=runtime, rngs=rngs)
        self.decoder = OobleckDecoder(config, runtime=runtime, rngs=rngs)

    def encode(
        self, audio: jax.Array, lengths: jax.Array | None = None, *, tile_frames: int | None = None
    ) -> DiagonalGaussian:
        """Encode [B, channels, samples] in [-1, 1] to the posterior over [B, samples // hop_length, 64].

        As in the torch model, samples beyond the last whole frame only serve as context for it.

        Args:
            lengths: [B] int32, number of samples of each item; later samples are padding. The first
                lengths // hop_length frames of the result equal those of the item without padding; the others are
                arbitrary.
            tile_frames: maximum number of frames encoded at once; None: the default for the backend.

        Raises:
            InputError: if the audio is shorter than one frame, or tile_frames is too small.
        """
        most = tile_frames or default_tile_frames()
        hop = self.hop_length
        frames = audio.shape[-1] // hop
        if frames < 1:
            raise InputError(f"audio: {audio.shape[-1]} samples are less than one latent frame of {hop}")
        x = jnp.moveaxis(audio, 1, 2).astype(self.runtime.dtype)
        overlap = math.ceil(_encoder_field(self.config) / hop)
        # The last window includes the samples beyond the last frame, so every window has room for them.
        extra = audio.shape[-1] - frames * hop
        windows = _Windows.of(frames, most, overlap)
        encoder = _prepared(self.encoder)
        if lengths is not None:
            lengths = lengths.astype(jnp.int32)

        def run(i):
            item, begin, start = windows.at(i)
            window = jax.lax.dynamic_slice(
                x, (item, begin * hop, 0), (1, windows.size * hop + extra, self.config.audio_channels)
            )
            y = encoder(window, None if lengths is None else lengths[item] - begin * hop)
            return windows.keep(y[0, : windows.size], start - begin)

        y = jax.lax.map(run, jnp.arange(x.shape[0] * windows.count))
        return DiagonalGaussian.of(y.reshape(x.shape[0], -1, y.shape[-1])[:, :frames])

    def decode(
        self, latents: jax.Array, lengths: jax.Array | None = None, *, tile_frames: int | None = None
    ) -> jax.Array:
        """Decode [B, frames, 64] to audio [B, channels, frames * hop_length] float32, not limited to [-1, 1].

        Windows are decoded one after the other, each on one device; with an active mesh, they are divided among all
        devices.

        Args:
            lengths: [B] int32, number of frames of each item; later frames are padding, and arbitrary in the result.
            tile_frames: maximum number of frames decoded at once; None: the default for the backend.

        Raises:
            InputError: if tile_frames is too small to leave anything between two overlaps.
        """
        most = tile_frames or default_tile_frames()
        x = latents.astype(self.runtime.dtype)
        batch, frames, channels = x.shape
        if lengths is not None:
            lengths = lengths.astype(jnp.int32)
        mesh = jax.sharding.get_abstract_mesh()
        devices = 1 if mesh.empty else mesh.size
        windows = _Windows.of(frames, most, _decoder_field(self.config), devices // math.gcd(batch, devices))
        decoder = _prepared(self.decoder)

        def window(decoder, x, lengths, i, fitted=False):
            item, begin, start = windows.at(i, fitted)
            piece = jax.lax.dynamic_slice(x, (item, begin, 0), (1, windows.size, channels))
            y = decoder(piece, None if lengths is None else lengths[item] - begin)[0]
            y = windows.keep(y, start - begin, self.hop_length).T  # [channels, samples]
            return item, start, y.astype(jnp.float32)

        if devices == 1:
            # Written where they belong: joining them afterwards would take the memory of the song twice more.
            def write(audio, i):
                item, start, y = window(decoder, x, lengths, i, fitted=True)
                return jax.lax.dynamic_update_slice(audio, y[None], (item, 0, start * self.hop_length)), None

            empty = jnp.zeros((batch, self.config.audio_channels, frames * self.hop_length), jnp.float32)
            return jax.lax.scan(write, empty, jnp.arange(batch * windows.count))[0]

        def run(decoder, x, lengths, items):
            return jax.lax.map(lambda i: window(decoder, x, lengths, i)[2], items)

        items = P(mesh.axis_names)
        run = jax.shard_map(run, in_specs=(P(), P(), P(), items), out_specs=items, check_vma=False)
        y = run(decoder, x, lengths, jnp.arange(batch * windows.count))
        y = y.reshape(batch, windows.count, *y.shape[1:]).swapaxes(1, 2)
        return y.reshape(batch, y.shape[1], -1)[:, :, : frames * self.hop_length]


@dataclasses.dataclass(frozen=True)
class _Windows:
    """The division of an item's frames into windows of one size. Of each window, `step` frames are kept, which are
    `overlap` frames away from its inner edges. At the ends of the item the network's own zero padding applies, as
    without windows.
    """

    frames: int
    size: int
    step: int
    overlap: int
    count: int

    @classmethod
    def of(cls, frames: int, most: int, overlap: int, multiple: int = 1) -> "_Windows":
        """Return windows of at most `most` frames; their number is a multiple of `multiple`. Raise InputError if this
        is impossible."""
        if frames <= most and multiple == 1:
            return cls(frames, frames, frames, overlap, 1)
        if most <= 2 * overlap:
            raise InputError(f"tile_frames: {most} leaves nothing between two overlaps of {overlap} frames; raise it")
        count = -(-frames // (most - 2 * overlap))
        count = -(-count // multiple) * multiple
        step = -(-frames // count)
        return cls(frames, min(frames, step + 2 * overlap), step, overlap, count)

    def at(self, i: jax.Array, fitted: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the item of window i, the window's first frame, and the first of the item's frames to keep from it.

        Args:
            fitted: whether the frames to keep of the last window move back, so that they end with the item.
        """
        item, start = i // self.count, i % self.count * self.step
        start = jnp.minimum(start, self.frames - self.step) if fitted else start
        return item, jnp.clip(start - self.overlap, 0, self.frames - self.size), start

    def keep(self, y: jax.Array, first: jax.Array, rate: int = 1) -> jax.Array:
        """Cut [size * rate, C] to [step * rate, C], with zeros past the end of the item."""
        y = jnp.pad(y, ((0, self.step * rate), (0, 0))) if self.count > 1 else y
        return jax.lax.dynamic_slice_in_dim(y, first * rate, self.step * rate)


def _prepared(network: Network) -> Network:
    """Return the network with the factors of its activations, which XLA would compute again for each window."""
    network = nnx.merge(*nnx.split(network))
    for _, module in list(nnx.iter_modules(network)):
        for name, part in list(vars(module).items()):
            if isinstance(part, Snake):
                setattr(module, name, part.prepared())
    return network


def _kernel(shape: tuple[int, int, int], runtime: Runtime, rngs: nnx.Rngs) -> nnx.Param:
    init = lecun_normal(in_axis=(0, 1), out_axis=2)
    return parameter(init(rngs.params(), shape, jnp.dtype(runtime.param_dtype)), None, "channels", "channels")


def _zero_from(length: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if length is None else jnp.where(jnp.arange(x.shape[1])[:, None] < length, x, 0)


_UNIT_FIELD = 3 * (1 + 3 + 9)  # samples on either side that three residual units read


def _decoder_field(config: AutoencoderConfig) -> int:
    """Return the receptive field: the number of latent frames on either side that a frame's samples depend on."""
    field = 3
    for stride in config.downsampling_ratios:
        field = math.ceil((field + _UNIT_FIELD) / stride) + 1
    return field + 3


def _encoder_field(config: AutoencoderConfig) -> int:
    """Return the receptive field: the number of samples on either side that a frame's latents depend on."""
    rate = config.patch_size
    field = 4 * rate
    for stride in config.downsampling_ratios:
        field += (_UNIT_FIELD + 2 * stride) * rate
        rate *= stride
    return field + rate
