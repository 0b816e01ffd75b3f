"""Text in, music out: `prepare` turns a request into a job, `run` turns jobs into songs, `__call__` does both.

The keyword names are those of diffusers' `AceStepPipeline`.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer
from tqdm import tqdm

from acestep_jax.diffusion import denoise
from acestep_jax.diffusion.denoise import StepCallback
from acestep_jax.diffusion.solvers import STOCHASTIC
from acestep_jax.distributed import on_host
from acestep_jax.errors import InputError
from acestep_jax.inputs import programs, sources, tasks
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import (
    check_sampling,
    collate,
    draw_seeds,
    initial_noise,
    sampling_schedule,
    warn_of_padding,
)
from acestep_jax.inputs.keywords import requests_and_sampling, takes
from acestep_jax.inputs.prepare import Job, check_length, codebook_size, load_audio, prepare
from acestep_jax.inputs.prompt import PAD
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, LoadedAdapters
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.registry import FAMILY, SamplingDefaults
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.request import Arguments, Audio, Request, Sampling, unknown_name
from acestep_jax.song import AudioPipelineOutput, Song

logger = logging.getLogger(__name__)


class AceStepPipeline:
    """The networks of a checkpoint, put together. Text encoding, denoising and decoding are a compiled program each.

    `Job.program_key` names the programs that a song needs. A new batch size, number of steps or program key
    compiles once; prompts, seeds, times, regions and scales are data. One pipeline serves one thread at a time.

    Args:
        transformer, condition_encoder, text_encoder, vae, audio_tokenizer, audio_token_detokenizer: the networks; those
            that are None are not needed for what is done.
        tokenizer: of the text encoder.
        mesh: what the networks lie on; None: one device.
        sampling_defaults: of this checkpoint, in place of those of its variant in `models.registry`.
    """

    def __init__(
        self,
        transformer: AceStepTransformer1DModel | None = None,
        condition_encoder: AceStepConditionEncoder | None = None,
        text_encoder: Qwen3Model | None = None,
        vae: AutoencoderOobleck | None = None,
        tokenizer: Tokenizer | None = None,
        audio_tokenizer: AceStepAudioTokenizer | None = None,
        audio_token_detokenizer: AceStepAudioTokenDetokenizer | None = None,
        mesh: Mesh | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
    ):
        self.transformer = transformer
        self.condition_encoder = condition_encoder
        self.text_encoder = text_encoder
        self.vae = vae
        self.tokenizer = tokenizer
        self.audio_tokenizer = audio_tokenizer
        self.audio_token_detokenizer = audio_token_detokenizer
        self.mesh = mesh
        self.sampling_defaults = dict(sampling_defaults or {})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = checkpoint.SMALL_MODEL,
        *,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        networks: Sequence[str] | None = None,
        **unknown: Any,
    ) -> "AceStepPipeline":
        """Load a native checkpoint.

        Args:
            path: a folder that `acestep-jax convert from-torch` wrote; by default the small model of this package.
            dtype: "float32", "bfloat16" or "float16", of weights and computation; None: as stored.
            mesh: from `acestep_jax.make_mesh`; None: the first device.
            networks: names of the networks to load; None: all.

        Raises:
            InputError: if there is no checkpoint, it is damaged, or an argument is unknown.
        """
        for name in unknown:
            raise InputError(unknown_name(name, ("path", "dtype", "mesh", "networks")))
        manifest = checkpoint.read_manifest(path, None if networks is None else networks)
        loaded: dict[str, Any] = checkpoint.load(path, dtype=dtype, mesh=mesh, names=networks)
        tokenizer = checkpoint.load_tokenizer(path) if "text_encoder" in loaded else None
        return cls(**loaded, tokenizer=tokenizer, mesh=mesh, sampling_defaults=manifest.sampling)

    from_checkpoint = from_pretrained

    @property
    def transformer(self) -> AceStepTransformer1DModel | None:
        """The diffusion transformer, with the adapters that are loaded. Assigning another one discards them."""
        return self._loaded.network

    @transformer.setter
    def transformer(self, network: AceStepTransformer1DModel | None) -> None:
        self._loaded = LoadedAdapters.none(network)

    @property
    def adapters(self) -> Mapping[str, float]:
        """The scale of each adapter that is loaded, by name; 0 is off. Read only, see `set_adapters`."""
        return self._loaded.scales

    def load_lora(
        self,
        adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
        scale: float | Sequence[float] = 1.0,
        *,
        name: str | Sequence[str] | None = None,
    ) -> None:
        """Load LoRA or DoRA adapters beside the weights of `transformer`; the changes of all loaded adapters add up.

        Args:
            adapters: a folder that training or `acestep-jax convert lora-from-torch` wrote, what `load_adapter` read,
                or several.
            scale: 1 is what was trained, 0 nothing; one for all or one for each.
            name: one for each; None: the names of their folders, followed by -2, -3, ... where a name is taken.

        Raises:
            InputError: if there is no adapter, it is damaged or for another model, a scale is not a finite number, or a
                name is taken.
        """
        with _on_mesh(self.mesh):
            self._loaded = self._loaded.load(adapters, scale, name)

    def set_adapters(self, scales: Mapping[str, float]) -> None:
        """Change the scales of loaded adapters, which compiles nothing; those that are not named are off.

        Raises:
            InputError: if a name is unknown, or a scale is not a finite number.
        """
        with _on_mesh(self.mesh):
            self._loaded = self._loaded.set(scales)

    def unload_lora(self, names: str | Iterable[str] | None = None) -> None:
        """Remove adapters, None: all; the weights are then what they were, bit for bit.

        Raises:
            InputError: if a name is unknown.
        """
        with _on_mesh(self.mesh):
            self._loaded = self._loaded.unload(names)

    @takes(Arguments)
    def __call__(
        self,
        *,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
        **keywords: Any,
    ) -> AudioPipelineOutput:
        """Generate a song for each prompt, or for each `Request`.

        Args:
            {arguments}
            output_type: "np", or "latent" to leave out the decoding.
            callback_on_step_end: called after each step with its index, the time t at its beginning and the latents
                [B, frames, C] at its end; what it raises ends the call.

        A list of prompts is a batch; every argument of a song may then be a list with one value for each prompt. Song i
        of one seed s has the seed s + i. The same seed gives the same song, alone or in any batch.

        Returns:
            The songs. Each has a peak of -1 dBFS, but for repainted ones: outside of the regions these are their
            source, sample for sample.

        Raises:
            InputError: if an argument is unknown, out of range, of the wrong shape, or not accepted by the task.
            OSError: if a sound file cannot be read.
        """
        requests, sampling = requests_and_sampling(keywords)
        jobs = [self.prepare(request) for request in requests]
        return AudioPipelineOutput(
            self.run(jobs, Sampling(**sampling), output_type=output_type, on_step=callback_on_step_end)
        )

    def prepare(self, request: Request) -> Job:
        """Read the files of a request, check all of it, and return the job, see `inputs.prepare`.

        Raises:
            InputError: if the request cannot be fulfilled.
            OSError: if a sound file cannot be read.
        """
        job = prepare(request, self.configs, self._need("tokenizer"))
        config = self.transformer.config if self.transformer is not None else None
        if config is not None and config.turbo and not job.task.turbo:
            logger.warning("task_type %s: turbo models were not trained for it; use a base model", job.task_type)
        return job

    def run(
        self,
        jobs: Sequence[Job],
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        *,
        output_type: str = "np",
        on_step: StepCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Song]:
        """Generate the songs of jobs as one batch, padded for buckets and the mesh.

        Args:
            output_type: see `__call__`.
            on_step: called after each step with its index, the time t at its beginning and the latents
                [B, frames, C] at its end; what it raises ends the run.
            should_stop: asked before each step, in all processes alike; if it returns true, the run ends.

        Raises:
            InputError: if the sampling is not accepted by a job's task, or its times are out of range.
            Cancelled: if `should_stop` said so.
        """
        if output_type not in ("np", "latent"):
            raise InputError(f'output_type: expected "np" or "latent", found {output_type!r}')
        if not jobs:
            return []
        check_sampling(jobs, sampling)
        transformer = self._need("transformer")
        config = transformer.config
        times, guided, scale = sampling_schedule(sampling, self.defaults, turbo=config.turbo)
        steps, count = len(times) - 1, len(jobs)
        # One song is replicated over a mesh's data; several are filled up with copies of the last one.
        multiple = 1 if self.mesh is None or count == 1 else self.mesh.shape["data"]
        jobs = [*jobs, *[jobs[-1]] * (-count % multiple)]
        pad = None
        if sampling.attend_to_padding:
            pad = self._need("tokenizer").token_to_id(PAD) or 0
            warn_of_padding(jobs, self._need("condition_encoder").config.sliding_window)
        batch = collate(jobs, pad=pad)
        draws_noise = sampling.solver in STOCHASTIC
        seeds, keys = draw_seeds(jobs, needed=draws_noise)
        dtype = transformer.runtime.dtype
        drawn = initial_noise(
            jobs,
            seeds,
            keys,
            sampling.noise,
            frames=batch.frames,
            channels=config.audio_acoustic_hidden_dim,
            dtype=dtype,
        )
        method = denoise.Method(
            solver=sampling.solver,
            guidance=sampling.guidance if scale > 1 else None,
            blend=batch.plain is not None and sampling.cover_mode == "blend",
        )
        with _on_mesh(self.mesh), _progress_bar(steps + 2) as bar:
            bar.set_description("encoding")
            networks = self.networks
            clean, source = sources.source_latents(networks, jobs, batch.frames, drawn.shape[2])
            condition, plain = sources.conditions(
                networks,
                batch,
                sources.references(self._need("vae"), jobs),
                attend_to_padding=sampling.attend_to_padding,
            )
            kept = batch.keeps_source[:, None] & ~batch.mask
            injects = sampling.repaint_injection_ratio > 0 and bool(batch.keeps_source.any())
            inputs = denoise.Inputs(
                x=times[0] * drawn + (1 - times[0]) * clean if sampling.cover_noise_strength else drawn,
                lengths=batch.lengths,
                condition=condition,
                source=source,
                silent=batch.silent,
                mask=batch.mask,
                times=times,
                guided=guided,
                guidance_scale=np.float32(scale),
                keys=keys if draws_noise else None,
                plain_condition=plain,
                cover_strength=None if plain is None else batch.cover_strength,
                kept=kept if injects else None,
                clean=clean if injects else None,
                noise=drawn if injects else None,
                injected_steps=np.int32(round(sampling.repaint_injection_ratio * steps)) if injects else None,
            )
            bar.update()
            bar.set_description("denoising")
            # A bar advances by step; but all processes must run the same programs, and only the first has a bar.
            watched = on_step is not None or should_stop is not None or not bar.disable and jax.process_count() == 1
            if watched:
                x = denoise.denoise_in_pieces(
                    transformer,
                    self._need("condition_encoder"),
                    inputs,
                    method=method,
                    on_step=on_step,
                    should_stop=should_stop,
                    progress=bar.update,
                )
            else:
                x = denoise.denoise(transformer, self._need("condition_encoder"), inputs, method=method)
                x.block_until_ready()
                bar.update(steps)
            audios = None
            if output_type == "np":
                bar.set_description("decoding")
                audios = on_host(programs.decode(self._need("vae"), x, batch.lengths, ~batch.keeps_source))
            bar.update()
            bar.set_description("done")
        latents = np.asarray(on_host(x))
        return [
            Song(
                audio=None if audios is None else sources.finished(job, audios[i], self._need("vae").config),
                latents=latents[i, : job.frames].copy(),
                sample_rate=self.sample_rate,
                seed=seeds[i],
            )
            for i, job in enumerate(jobs[:count])
        ]

    def song_to_codes(self, song: Audio) -> np.ndarray:
        """Return the audio codes of a song, [n] int32, 5 for each second.

        Args:
            song: a sound file, or an array [channels, samples].

        Raises:
            InputError: if there is no audio tokenizer, or the song cannot be read.
        """
        self._check_tokenizer()
        vae = self._need("vae")
        wave = load_audio(song, "song", vae.config)
        wave = np.pad(wave, ((0, 0), (0, -wave.shape[1] % vae.hop_length)))
        frames = wave.shape[1] // vae.hop_length
        with _on_mesh(self.mesh):
            latents = sources.encode_audio(vae, [wave], BUCKETS.frames_of(frames))
            return sources.tokenize(self.networks, latents, [frames])[0]

    def codes_to_song(self, text: str) -> np.ndarray:
        """Return the audio [channels, samples] float32 that codes as text stand for, with a peak of -1 dBFS.

        Raises:
            InputError: if there is no audio tokenizer, no code in the text, or one that is out of range.
        """
        codes = tasks.codes_from_text(text, self._check_tokenizer())
        frames = len(codes) * self._need("audio_tokenizer").config.pool_window_size
        check_length(frames / self.latents_per_second, "audio_codes")
        with _on_mesh(self.mesh):
            latents = sources.detokenize(self.networks, [codes], BUCKETS.frames_of(frames))
            vae = self._need("vae")
            made = programs.decode(vae, latents, np.array([frames], np.int32), np.array([True]))
        return on_host(made)[0, :, : frames * vae.hop_length]

    @property
    def networks(self) -> dict[str, Any]:
        """The networks that are loaded, by name."""
        found = {name: getattr(self, name) for name in FAMILY.networks}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def configs(self) -> dict[str, Any]:
        """The architectures of the networks that are loaded, by name."""
        return {name: network.config for name, network in self.networks.items()}

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self._need("vae").config.sampling_rate

    @property
    def latents_per_second(self) -> float:
        """Latent frames in a second, Hz."""
        return self.sample_rate / self._need("vae").hop_length

    @property
    def defaults(self) -> SamplingDefaults:
        """What `Sampling` leaves open: the variant's defaults, or the checkpoint's own."""
        config = self._need("transformer").config
        variant = config.variant if config.variant in FAMILY.defaults else "turbo" if config.turbo else "base"
        return dataclasses.replace(FAMILY.defaults[variant], **self.sampling_defaults)

    def _need(self, name: str) -> Any:
        found = getattr(self, name)
        if found is None:
            raise InputError(f"the pipeline was loaded without {name}; load it with this network")
        return found

    def _check_tokenizer(self) -> int:
        """Return how many audio codes there are; raise InputError if the networks for them are missing."""
        size = codebook_size(self.configs)
        if size is None:
            raise InputError("the checkpoint has no audio tokenizer and detokenizer; convert one that has them")
        return size


def _progress_bar(total: int) -> tqdm:
    return tqdm(total=total, unit="step", disable=None if jax.process_index() == 0 else True)


def _on_mesh(mesh: Mesh | None) -> Any:
    return jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext()
