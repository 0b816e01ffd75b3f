"""Text in, music out. The keyword names are those of diffusers' `AceStepPipeline`."""

import contextlib
import dataclasses
import logging
import math
import operator
import secrets
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tokenizers import Tokenizer
from tqdm import tqdm

from acestep_jax import audio, checkpoint, stages
from acestep_jax.adapter import Adapter, merge_adapters, resolve_adapters
from acestep_jax.errors import InputError
from acestep_jax.flow_matching import custom_schedule, schedule
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.text_encoder import Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.prompt import MAX_LYRIC_TOKENS, MAX_PROMPT_TOKENS, lyric_text, prompt_text, tokenize

logger = logging.getLogger(__name__)

MIN_DURATION, MAX_DURATION = 10.0, 600.0  # seconds

# Lengths are padded to multiples of these, so that few programs are compiled; padding is masked.
PROMPT_BUCKET, LYRIC_BUCKET = 64, 256  # tokens
FRAMES_BUCKET = 256  # latent frames; more for long songs, see `bucket`


@dataclasses.dataclass(frozen=True)
class AudioPipelineOutput:
    """What a pipeline returns.

    audios: [B, channels, samples] float32 in [-1, 1]; None with `output_type="latent"`.
    latents: [B, frames, 64] float32.
    sample_rate: Hz.
    seeds: of each song, to make it again; None for given noise or keys.
    """

    audios: np.ndarray | None
    latents: np.ndarray
    sample_rate: int
    seeds: tuple[int, ...] | None

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Writes WAV, FLAC, OGG or MP3, by suffix. A batch becomes `song-0.wav`, `song-1.wav`, ...

        Of several processes, all of which have the songs, let one save them.

        Raises:
            InputError: if there is no audio, or see `audio.check_output`.
            OSError: if a file cannot be written.
        """
        if self.audios is None:
            raise InputError('output_type="latent" gave no audio to save')
        path = Path(path)
        paths = [path]
        if len(self.audios) > 1:
            paths = [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.audios))]
        for target in paths:
            audio.check_output(target, overwrite=overwrite)
        for target, song in zip(paths, self.audios, strict=True):
            audio.write(target, song, self.sample_rate, overwrite=overwrite)
        return paths


class AceStepPipeline:
    """The networks of a checkpoint, put together. Text encoding, denoising and decoding are a compiled program each.

    A new number of songs or steps compiles once, and so does a new pair of buckets of duration and of text; prompts,
    seeds, times and strengths are data. One pipeline serves one thread at a time.
    """

    def __init__(
        self,
        transformer: AceStepTransformer1DModel,
        condition_encoder: AceStepConditionEncoder,
        text_encoder: Qwen3Model,
        vae: AutoencoderOobleck,
        tokenizer: Tokenizer,
        audio_tokenizer: AceStepAudioTokenizer | None = None,
        audio_token_detokenizer: AceStepAudioTokenDetokenizer | None = None,
        mesh: Mesh | None = None,
    ):
        self.transformer = transformer
        self.condition_encoder = condition_encoder
        self.text_encoder = text_encoder
        self.vae = vae
        self.tokenizer = tokenizer
        self.audio_tokenizer = audio_tokenizer
        self.audio_token_detokenizer = audio_token_detokenizer
        self.mesh = mesh
        self.sample_rate: int = vae.config.sampling_rate
        self.latents_per_second: float = self.sample_rate / vae.hop_length
        self._reporter = stages.StepReporter()

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None
    ) -> "AceStepPipeline":
        """Loads a native checkpoint.

        Args:
            path: a folder that `python -m convert from-torch` made.
            dtype: "float32", "bfloat16" or "float16", of weights and computation; None: as stored.
            mesh: from `acestep_jax.make_mesh`; None: the first device.

        Raises:
            InputError: if there is no checkpoint, or it is damaged.
        """
        networks = checkpoint.load(path, dtype=dtype, mesh=mesh)
        return cls(**networks, tokenizer=checkpoint.load_tokenizer(path), mesh=mesh)

    def load_lora(
        self,
        adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
        scale: float | Sequence[float] = 1.0,
    ) -> None:
        """Merges LoRA or DoRA adapters into `transformer`, a new network; songs take no longer than without.

        What the adapters of one call change adds up; a further call starts from the weights that this one made. To
        undo it, keep `plain = pipe.transformer` and set `pipe.transformer = plain`.

        Args:
            adapters: a folder that training or `python -m convert lora-from-torch` made, what `load_adapter` read,
                or several.
            scale: strength, 1 is what was trained and 0 nothing; one for all or one for each.

        Raises:
            InputError: if there is no adapter, it is damaged or for another model, or a scale is no finite number.
        """
        found, scales = resolve_adapters(adapters, scale, self.transformer.config)
        with _on_mesh(self.mesh):
            self.transformer = merge_adapters(self.transformer, found, scales)

    def __call__(
        self,
        prompt: str | Sequence[str],
        lyrics: str | Sequence[str] = "",
        audio_duration: float | None = 60.0,
        vocal_language: str | Sequence[str] = "en",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        *,
        seed: int | Sequence[int] | jax.Array | None = None,
        latents: np.ndarray | jax.Array | None = None,
        task_type: str = "text2music",
        output_type: str = "np",
        callback_on_step_end: stages.StepCallback | None = None,
        instruction: str | None = None,
        max_text_length: int = MAX_PROMPT_TOKENS,
        max_lyric_length: int = MAX_LYRIC_TOKENS,
        bpm: int | None = None,
        keyscale: str | None = None,
        timesignature: str | int | None = None,
        cfg_interval_start: float = 0.0,
        cfg_interval_end: float = 1.0,
        timesteps: Sequence[float] | None = None,
    ) -> AudioPipelineOutput:
        """Makes a song for each prompt.

        Args:
            prompt: one, or several for a batch.
            lyrics, vocal_language: one for all songs or one for each; "[Instrumental]" asks for no voice.
            audio_duration: seconds, 10 to 600; None: 60.
            num_inference_steps, guidance_scale, shift: None: the variant's own, 8 steps, no guidance and shift 3 for
                turbo; 50 steps, guidance 7 and shift 1 for base and sft.
            seed: a number, or one for each song; song i of one number s has seed s + i. Or a JAX key, or one for each
                song. The same seed gives the same song, alone or in any batch. None: a new one, found in the result.
            latents: the noise to start from, [B, frames, 64], instead of a seed's.
            task_type: "text2music".
            output_type: "np", or "latent" to leave out the decoding.
            callback_on_step_end: called with step, timestep and latents [B, frames, 64] after each step. What it
                raises is raised when the program has ended.
            instruction: None: that of text to music.
            max_text_length, max_lyric_length: tokens that are read; what is longer is cut, with a warning.
            bpm: beats per minute, 30 to 300; keyscale: such as "F# minor"; timesignature: 2, 3, 4 or 6. None: the
                model decides.
            cfg_interval_start, cfg_interval_end: guidance acts while start <= 1 - t <= end, as in diffusers; steps
                outside take as long as those within.
            timesteps: falling times within (0, 1], instead of num_inference_steps and shift.

        Returns:
            Audio scaled to a peak of -1 dBFS, and latents.

        Raises:
            InputError: if an argument is out of range or of the wrong shape.
        """
        if task_type != "text2music":
            raise InputError(f'task_type: only "text2music" is there so far, found {task_type!r}')
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        # One song is a batch of its own right: it is replicated over data, with a warning.
        if self.mesh is not None and len(prompts) > 1 and len(prompts) % self.mesh.shape["data"]:
            raise InputError(
                f"prompt: {len(prompts)} do not divide by the mesh's data={self.mesh.shape['data']}; give a multiple "
                "of that, or use a mesh with data=1"
            )
        duration = _check_duration(audio_duration)
        texts, words = self._texts(prompts, lyrics, vocal_language, duration, bpm, keyscale, timesignature, instruction)
        times = self._times(num_inference_steps, shift, timesteps)
        scale = self._guidance(guidance_scale)
        guided_steps = _guided_steps(times, cfg_interval_start, cfg_interval_end)
        if output_type not in ("np", "latent"):
            raise InputError(f'output_type: expected "np" or "latent", found {output_type!r}')

        frames = math.ceil(duration * self.latents_per_second)
        channels = self.transformer.config.audio_acoustic_hidden_dim
        seeds, noise = self._noise(seed, latents, (len(prompts), frames, channels))
        lengths = np.full(len(prompts), frames, np.int32)
        tokens = self._tokenize(texts, max_text_length, PROMPT_BUCKET, "prompt")
        lyric_tokens = self._tokenize(words, max_lyric_length, LYRIC_BUCKET, "lyrics")

        with _on_mesh(self.mesh), _progress_bar() as bar:
            bar.set_description("encoding the text")
            condition, condition_lengths = stages.encode(
                self.text_encoder, self.condition_encoder, tokens, lyric_tokens
            )
            bar.update()
            bar.set_description(f"denoising in {len(times) - 1} steps")
            with self._reporter.watching(callback_on_step_end, frames) as report:
                x = stages.denoise(
                    self.transformer,
                    self.condition_encoder,
                    noise,
                    condition,
                    condition_lengths,
                    lengths,
                    times,
                    np.float32(scale),
                    guided_steps,
                    guided=scale > 1.0,
                    report=report,
                )
                x.block_until_ready()
            bar.update()
            audios = None
            if output_type == "np":
                bar.set_description("decoding")
                audios = stages.decode(self.vae, x, lengths)
                audios = on_host(audios)[:, :, : frames * self.vae.hop_length]
            bar.update()
            bar.set_description("done")
        return AudioPipelineOutput(audios, on_host(x)[:, :frames], self.sample_rate, seeds)

    def _texts(self, prompts, lyrics, language, duration, bpm, keyscale, timesignature, instruction):
        if not prompts:
            raise InputError("prompt: the list is empty; give at least one")
        texts = [
            prompt_text(
                text,
                audio_duration=duration,
                bpm=bpm,
                keyscale=keyscale,
                timesignature=timesignature,
                instruction=instruction,
            )
            for text in prompts
        ]
        lyrics = _for_each(lyrics, len(prompts), "lyrics")
        languages = _for_each(language, len(prompts), "vocal_language")
        return texts, [lyric_text(*pair) for pair in zip(lyrics, languages, strict=True)]

    def _tokenize(self, texts, max_length, bucket, what):
        return tokenize(self.tokenizer, texts, max_length=max_length, multiple=bucket, what=what)

    def _times(self, num_inference_steps, shift, timesteps) -> np.ndarray:
        if timesteps is not None:
            return custom_schedule(timesteps)
        steps, default_shift = (8, 3.0) if self.transformer.config.turbo else (50, 1.0)
        return schedule(
            steps if num_inference_steps is None else num_inference_steps, default_shift if shift is None else shift
        )

    def _guidance(self, guidance_scale) -> float:
        turbo = self.transformer.config.turbo
        if guidance_scale is None:
            return 1.0 if turbo else 7.0
        if not 0 <= guidance_scale < math.inf:
            raise InputError(f"guidance_scale: expected a number of at least 0, found {guidance_scale}")
        if turbo and guidance_scale > 1:
            logger.warning("guidance_scale %s is ignored: guidance is distilled into turbo models", guidance_scale)
            return 1.0
        return float(guidance_scale)

    def _noise(self, seed, latents, shape):
        batch = shape[0]
        if latents is not None:
            given = np.asarray(latents, np.float32)
            if given.shape != shape:
                raise InputError(
                    f"latents: expected shape {list(shape)} (songs, frames, channels), found {list(given.shape)}"
                )
            return None, np.pad(given, ((0, 0), (0, bucket(shape[1]) - shape[1]), (0, 0)))
        if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(seed))
            keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(seed))
            if keys.ndim == 0:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(batch))
            if keys.shape != (batch,):
                raise InputError(f"seed: expected one key or {batch}, found {list(seed.shape)}")
            return None, _draw(keys, shape)
        if seed is None:
            seed = secrets.randbelow(2**32 - batch)
            if jax.process_count() > 1:
                seed = int(multihost_utils.broadcast_one_to_all(np.uint32(seed)))
        try:
            seeds = [operator.index(s) for s in np.atleast_1d(np.asarray(seed)).tolist()]
        except TypeError:
            raise InputError(f"seed: expected whole numbers or a key of jax.random.key, found {seed!r}") from None
        if np.ndim(seed) == 0:
            seeds = [seeds[0] + i for i in range(batch)]
        if len(seeds) != batch:
            raise InputError(f"seed: expected one number or {batch}, found {len(seeds)}")
        if bad := [s for s in seeds if not 0 <= s < 2**32]:
            raise InputError(f"seed: expected numbers from 0 to 2^32 - 1, found {bad[0]}")
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        return tuple(seeds), _draw(keys, shape)


def _draw(keys: jax.Array, shape: tuple[int, int, int]) -> np.ndarray:
    """Noise on the host, so that it may go to any device, mesh or process; the longer bucket begins with the same."""
    return np.asarray(stages.noise(keys, (bucket(shape[1]), shape[2])))


def bucket(frames: int) -> int:
    """`frames`, rounded up to a multiple of FRAMES_BUCKET, or of an eighth of the power of two below: at most an eighth
    more than asked for beyond 2048 frames, and 31 sizes up to 600 s."""
    step = max(FRAMES_BUCKET, 2 ** (frames - 1).bit_length() // 16)
    return -(-frames // step) * step


def on_host(x: jax.Array) -> np.ndarray:
    """All of an array, also of one that is spread over several processes."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def _progress_bar() -> tqdm:
    return tqdm(total=3, unit="stage", disable=None if jax.process_index() == 0 else True)


def _on_mesh(mesh: Mesh | None):
    return jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext()


def _for_each(value, batch: int, name: str) -> list[str]:
    values = [value] * batch if isinstance(value, str) else list(value)
    if len(values) != batch:
        raise InputError(f"{name}: expected one text or {batch}, one for each prompt, found {len(values)}")
    return values


def _check_duration(duration: float | None) -> float:
    duration = 60.0 if duration is None else float(duration)
    if not MIN_DURATION <= duration <= MAX_DURATION:
        raise InputError(f"audio_duration: expected {MIN_DURATION:g} to {MAX_DURATION:g} seconds, found {duration:g}")
    return duration


def _guided_steps(times: np.ndarray, start: float, end: float) -> np.ndarray:
    """[N] bool. Decided here, in double precision, because a step may lie right on a border."""
    if not 0.0 <= start <= end <= 1.0:
        raise InputError(
            f"cfg_interval_start, cfg_interval_end: expected 0 <= start <= end <= 1, found {start} and {end}"
        )
    progress = 1.0 - times[:-1].astype(np.float64)
    return (start <= progress) & (progress <= end)
