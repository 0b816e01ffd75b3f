"""Text in, music out. The keyword names are those of diffusers' `AceStepPipeline`."""

import contextlib
import dataclasses
import logging
import math
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

from acestep_jax.errors import InputError
from acestep_jax.inputs import programs, tasks
from acestep_jax.inputs.codec import Codec, bucket, on_host
from acestep_jax.inputs.prompt import MAX_LYRIC_TOKENS, MAX_PROMPT_TOKENS, PAD, tokenize
from acestep_jax.io import audio, checkpoint
from acestep_jax.io.adapter import Adapter, merge_adapters, resolve_adapters
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.request import Audio, Plan, Request, collect, is_key
from acestep_jax.request import plan as make_plan
from acestep_jax.sampling import Sampling

logger = logging.getLogger(__name__)

# Lengths are padded to multiples of these, so that few programs are compiled; padding is masked.
PROMPT_BUCKET, LYRIC_BUCKET = 64, 256  # tokens
FADE = 0.025  # seconds at each end of a repainted region, in which its source fades out and in


@dataclasses.dataclass(frozen=True)
class AudioPipelineOutput:
    """What a pipeline returns.

    audios: [B, channels, samples] float32, silent after the end of a shorter song; None with `output_type="latent"`.
    latents: [B, frames, 64] float32, zero there.
    sample_rate: Hz.
    seeds: of each song, to make it again; None for given noise or keys.
    samples, frames: of each song.
    """

    audios: np.ndarray | None
    latents: np.ndarray
    sample_rate: int
    seeds: tuple[int | None, ...] | None
    samples: tuple[int, ...]
    frames: tuple[int, ...]

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
        for target, song, samples in zip(paths, self.audios, self.samples, strict=True):
            audio.write(target, song[:, :samples], self.sample_rate, overwrite=overwrite)
        return paths


class AceStepPipeline:
    """The networks of a checkpoint, put together. Text encoding, denoising and decoding are a compiled program each.

    A new number of songs or steps compiles once, and so does a new pair of buckets of duration and of text, and a new
    number of sources, references or codes among the songs; prompts, seeds, times, regions and strengths are data, and
    so is what the sources hold. One pipeline serves one thread at a time.
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
        self._reporter = programs.StepReporter()

    @classmethod
    def from_checkpoint(
        cls, path: str | Path = checkpoint.SMALL_MODEL, *, dtype: str | None = None, mesh: Mesh | None = None
    ) -> "AceStepPipeline":
        """Loads a native checkpoint.

        Args:
            path: a folder that `python -m convert from-torch` made; by default the small model of this package.
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
        prompt: str | Request | Sequence[str | Request],
        lyrics: str | Sequence[str] = "",
        audio_duration: float | None = None,
        vocal_language: str | Sequence[str] = "en",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        *,
        seed: int | Sequence[int] | jax.Array | None = None,
        latents: np.ndarray | jax.Array | None = None,
        task_type: str = "text2music",
        track_name: str | None = None,
        complete_track_classes: Sequence[str] = (),
        src_audio: Audio | None = None,
        reference_audio: Audio | None = None,
        audio_codes: str | Sequence[str] | None = None,
        repainting_start: float | Sequence[float] | None = None,
        repainting_end: float | Sequence[float] | None = None,
        audio_cover_strength: float = 1.0,
        output_type: str = "np",
        callback_on_step_end: programs.StepCallback | None = None,
        instruction: str | None = None,
        max_text_length: int = MAX_PROMPT_TOKENS,
        max_lyric_length: int = MAX_LYRIC_TOKENS,
        bpm: int | None = None,
        keyscale: str | None = None,
        timesignature: str | int | None = None,
        cfg_interval_start: float = 0.0,
        cfg_interval_end: float = 1.0,
        cfg_interval_in: str = "t",
        timesteps: Sequence[float] | None = None,
        solver: str = "euler",
        guidance: str = "apg",
        cover_mode: str = "switch",
        cover_noise_strength: float = 0.0,
        repaint_injection_ratio: float = 0.0,
        noise: str = "jax",
        attend_to_padding: bool = False,
    ) -> AudioPipelineOutput:
        """Makes a song for each prompt, or for each `Request`.

        Args:
            prompt: one, or several for a batch; a `Request` has all that one song is asked for, in place of the
                arguments that it names.
            lyrics, vocal_language, audio_codes: one for all songs or one for each.
            seed: a number, or one for each song; song i of one number s has seed s + i. Or a JAX key, or one for each
                song. The same seed gives the same song, alone or in any batch. None: a new one, found in the result.
            latents: the noise to start from, [B, frames, 64], instead of a seed's.
            audio_duration, bpm, keyscale, timesignature, instruction, task_type, track_name, complete_track_classes,
                src_audio, reference_audio, repainting_start, repainting_end, audio_cover_strength: for all songs, see
                `Request`.
            output_type: "np", or "latent" to leave out the decoding.
            callback_on_step_end: called with step, timestep and latents [B, frames, 64] after each step. What it
                raises is raised when the program has ended.
            max_text_length, max_lyric_length: tokens that are read; what is longer is cut, with a warning.
            num_inference_steps, guidance_scale, shift, timesteps, solver, guidance, cfg_interval_start,
                cfg_interval_end, cfg_interval_in, cover_mode, cover_noise_strength, repaint_injection_ratio, noise,
                attend_to_padding: see `Sampling`.

        Returns:
            Audio and latents. Songs have a peak of -1 dBFS, but for repainted ones: outside of the regions these are
            their source, sample for sample.

        Raises:
            InputError: if an argument is out of range or of the wrong shape.
            OSError: if a sound file cannot be read.
        """
        shared = dict(
            audio_duration=audio_duration,
            bpm=bpm,
            keyscale=keyscale,
            timesignature=timesignature,
            instruction=instruction,
            task_type=task_type,
            track_name=track_name,
            complete_track_classes=complete_track_classes,
            src_audio=src_audio,
            reference_audio=reference_audio,
            repainting_start=repainting_start,
            repainting_end=repainting_end,
            audio_cover_strength=audio_cover_strength,
        )
        each = dict(lyrics=lyrics, vocal_language=vocal_language, audio_codes=audio_codes)
        requests = collect(prompt, each, shared, seed, latents)
        # One song is a batch of its own right: it is replicated over data, with a warning.
        if self.mesh is not None and len(requests) > 1 and len(requests) % self.mesh.shape["data"]:
            raise InputError(
                f"prompt: {len(requests)} do not divide by the mesh's data={self.mesh.shape['data']}; give a multiple "
                "of that, or use a mesh with data=1"
            )
        plans = [make_plan(request, self.codec.model) for request in requests]
        for name in sorted({plan.task_type for plan in plans if not tasks.TASKS[plan.task_type].turbo}):
            if self.transformer.config.turbo:
                logger.warning("task_type %s: turbo models were not trained for it; use a base model", name)
        if output_type not in ("np", "latent"):
            raise InputError(f'output_type: expected "np" or "latent", found {output_type!r}')
        sampling = Sampling(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            shift=shift,
            timesteps=timesteps,
            solver=solver,
            guidance=guidance,
            cfg_interval_start=cfg_interval_start,
            cfg_interval_end=cfg_interval_end,
            cfg_interval_in=cfg_interval_in,
            cover_mode=cover_mode,
            cover_noise_strength=cover_noise_strength,
            repaint_injection_ratio=repaint_injection_ratio,
            noise=noise,
            attend_to_padding=attend_to_padding,
        )
        if cover_noise_strength and any(plan.task_type != "cover" for plan in plans):
            raise InputError("cover_noise_strength: only covers start from their source; leave it at 0 for others")
        times, guided_steps, scale = sampling.schedule(self.transformer.config.turbo, self.transformer.config.variant)
        seeds, keys, drawn = self._noise(requests, [plan.frames for plan in plans], noise, sampling.draws_noise)
        lengths = np.array([plan.frames for plan in plans], np.int32)
        strengths = np.array([plan.cover_strength for plan in plans], np.float32)
        limits = (max_text_length, max_lyric_length)

        with _on_mesh(self.mesh), _progress_bar() as bar:
            bar.set_description("encoding")
            clean, source = self._source_latents(plans, drawn.shape[1])
            references = self._references(plans)
            words = [plan.lyrics for plan in plans]
            texts, plain = [plan.text for plan in plans], [plan.plain_text for plan in plans]
            condition, cover = self._encode(texts, words, references, limits, attend_to_padding), None
            if (strengths < 1).any():
                turned = self._encode(plain, words, references, limits, attend_to_padding)
                size = max(condition.tokens.shape[1], turned.tokens.shape[1])  # so that one can take the other's place
                condition, turned = _padded(condition, size), _padded(turned, size)
                cover = programs.Cover(turned, strengths)
            mask, injection = _rows(plans, "mask", drawn), None
            if repaint_injection_ratio and any(plan.kept for plan in plans):
                steps = np.int32(round(repaint_injection_ratio * (len(times) - 1)))
                made = mask | ~np.array([[plan.kept] for plan in plans])
                injection = programs.Injection(made, drawn, clean, steps)
            bar.update()
            bar.set_description(f"denoising in {len(times) - 1} steps")
            with self._reporter.watching(callback_on_step_end, lengths.max()) as report:
                x = programs.denoise(
                    self.transformer,
                    self.condition_encoder,
                    times[0] * drawn + (1 - times[0]) * clean if cover_noise_strength else drawn,
                    lengths,
                    condition,
                    programs.Context(source, _rows(plans, "silent", drawn), mask),
                    times,
                    np.float32(scale),
                    guided_steps,
                    keys if sampling.draws_noise else None,
                    cover,
                    injection,
                    program=programs.Program(
                        solver, guidance if scale > 1 else None, cover is not None and cover_mode == "blend"
                    ),
                    report=report,
                )
                x.block_until_ready()
            bar.update()
            audios = None
            if output_type == "np":
                bar.set_description("decoding")
                audios = on_host(programs.decode(self.vae, x, lengths, np.array([not plan.kept for plan in plans])))
                audios = self._finish(plans, audios)
            bar.update()
            bar.set_description("done")
        latents = np.array(on_host(x)[:, : lengths.max()])
        for row, length in zip(latents, lengths, strict=True):
            row[length:] = 0
        samples = tuple(plan.samples for plan in plans)
        return AudioPipelineOutput(audios, latents, self.sample_rate, seeds, samples, tuple(lengths.tolist()))

    @property
    def codec(self) -> Codec:
        """The networks between songs, latents and codes."""
        return Codec(self.vae, self.condition_encoder, self.audio_tokenizer, self.audio_token_detokenizer)

    def _check_padding(self, lengths: np.ndarray) -> None:
        """Warns where padding of lyrics, which reads the lyrics before it, is so far from them that it reads nothing:
        what the torch model makes of it then, the mean of everything, is not made here."""
        window = self.condition_encoder.config.sliding_window
        if (most := lengths.max() - lengths.min()) > window:
            logger.warning(
                "attend_to_padding: lyrics differ by %d tokens, more than the window of %d: not exactly what diffusers "
                "computes",
                most,
                window,
            )

    def _source_latents(self, plans: Sequence[Plan], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents of the songs to work on, and what the transformer is shown of them; zeros where there is none.
        [B, size, 64] float32 each."""
        clean = np.zeros((len(plans), size, self.transformer.config.audio_acoustic_hidden_dim), np.float32)
        codes = {i: plan.codes for i, plan in enumerate(plans) if plan.codes is not None}
        if rows := [i for i, plan in enumerate(plans) if plan.source is not None]:
            clean[rows] = self.codec.encode([plans[i].source for i in rows], size)
        if rows := [i for i, plan in enumerate(plans) if plan.tokenized]:
            found = self.codec.tokenize(clean[rows], [plans[i].frames for i in rows])
            codes |= dict(zip(rows, found, strict=True))
        source = clean.copy()
        if codes:
            made = self.codec.detokenize(list(codes.values()), size)
            for i, latents in zip(codes, made, strict=True):
                source[i] = latents
                if plans[i].source is None:
                    clean[i] = latents
        return clean, source

    def _encode(
        self,
        texts: list[str],
        words: list[str],
        references: tuple[jax.Array, np.ndarray] | None,
        limits: tuple[int, int],
        attend_to_padding: bool,
    ) -> programs.Condition:
        """The condition of songs with these texts and lyrics."""
        pad = PAD if attend_to_padding else None
        # Padding that counts must be diffusers': to the longest of the batch, with its token.
        multiples = (1, 1) if attend_to_padding else (PROMPT_BUCKET, LYRIC_BUCKET)
        tokens = tokenize(self.tokenizer, texts, max_length=limits[0], multiple=multiples[0], what="prompt", pad=pad)
        lyrics = tokenize(self.tokenizer, words, max_length=limits[1], multiple=multiples[1], what="lyrics", pad=pad)
        if attend_to_padding:
            self._check_padding(lyrics.mask.sum(1))
        clips, owners = references or (None, None)
        return programs.encode(
            self.text_encoder,
            self.condition_encoder,
            tokens,
            lyrics,
            clips,
            owners,
            attend_to_padding=attend_to_padding,
        )

    def _references(self, plans: Sequence[Plan]) -> tuple[jax.Array, np.ndarray] | None:
        """Latents of the reference clips [N, 750, 64], and which of them is each song's, N for none."""
        rows = [i for i, plan in enumerate(plans) if plan.reference is not None]
        if not rows:
            return None
        waves = np.stack([plans[i].reference for i in rows])
        owners = np.full(len(plans), len(rows), np.int32)
        owners[rows] = np.arange(len(rows))
        return programs.encode_audio(self.vae, waves, np.full(len(rows), waves.shape[-1], np.int32)), owners

    def _finish(self, plans: Sequence[Plan], audios: np.ndarray) -> np.ndarray:
        """Cut to the longest song; silent after the others; with the source outside of what was repainted."""
        songs = np.zeros((*audios.shape[:2], max(plan.samples for plan in plans)), np.float32)
        for song, made, plan in zip(songs, audios, plans, strict=True):
            made = made[:, : plan.samples]
            if plan.kept:
                mask = np.repeat(plan.mask, self.vae.hop_length)[: plan.samples]
                source = plan.source[:, : plan.samples]
                made = audio.splice(source, made, mask, plan.source_samples, round(FADE * self.sample_rate))
            song[:, : plan.samples] = made
        return songs

    def _noise(
        self, requests: Sequence[Request], frames: Sequence[int], kind: str, needs_keys: bool
    ) -> tuple[tuple[int | None, ...] | None, jax.Array, np.ndarray]:
        """Seeds where there are some, each song's key [B], and its noise [B, bucket, 64], which begins the same in
        every bucket."""
        shape = (bucket(max(frames)), self.transformer.config.audio_acoustic_hidden_dim)
        seeds, keys = _seeds(requests, needs_keys)
        # Drawn on the host, so that it may go to any device, mesh or process.
        noise = np.array(programs.noise(keys, shape))
        for i, request in enumerate(requests):
            size = (frames[i], shape[1])
            if request.latents is not None:
                given = np.asarray(request.latents, np.float32)
                if given.shape != size:
                    raise InputError(
                        f"latents: expected {list(size)} (frames, channels) for each song, found {list(given.shape)}"
                    )
            elif kind == "jax":
                continue
            elif seeds is None or seeds[i] is None:
                raise InputError("noise: PyTorch's is drawn from numbers; give a number as the seed, no key")
            else:
                drawn = noise.cuda_normal(seeds[i], math.prod(size), noise.gpu_threads(kind))
                # PyTorch draws in the network's dtype.
                given = drawn.reshape(size).astype(self.transformer.config.dtype).astype(np.float32)
            noise[i] = np.pad(given, ((0, shape[0] - frames[i]), (0, 0)))
        return seeds, keys, noise


def _seeds(requests: Sequence[Request], needed: bool) -> tuple[tuple[int | None, ...] | None, jax.Array]:
    """Seeds, new ones for songs that have none and need one, and the keys of all. None: a key or noise was given."""
    fresh = secrets.randbelow(2**32 - len(requests))
    if jax.process_count() > 1:
        fresh = int(multihost_utils.broadcast_one_to_all(np.uint32(fresh)))
    seeds, keys = [], []
    for i, request in enumerate(requests):
        seed = request.seed
        if is_key(seed):
            seeds.append(None)
            keys.append(seed)
            continue
        if seed is None and (request.latents is None or needed):
            seed = fresh + i
        if seed is not None and not 0 <= seed < 2**32:
            raise InputError(f"seed: expected numbers from 0 to 2^32 - 1, found {seed}")
        seeds.append(seed)
        keys.append(jax.random.key(np.uint32(seed or 0)))
    return None if set(seeds) == {None} else tuple(seeds), jnp.stack(keys)


def _padded(condition: programs.Condition, size: int) -> programs.Condition:
    """With zeros up to so many tokens, which do not count."""
    tokens = jnp.pad(condition.tokens, ((0, 0), (0, size - condition.tokens.shape[1]), (0, 0)))
    return condition._replace(tokens=tokens)


def _rows(plans: Sequence[Plan], name: str, like: np.ndarray) -> np.ndarray:
    """[B, size] bool: a field of all plans, true in the padding."""
    rows = np.ones(like.shape[:2], bool)
    for row, plan in zip(rows, plans, strict=True):
        row[: plan.frames] = getattr(plan, name)
    return rows


def _progress_bar() -> tqdm:
    return tqdm(total=3, unit="stage", disable=None if jax.process_index() == 0 else True)


def _on_mesh(mesh: Mesh | None):
    return jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext()
