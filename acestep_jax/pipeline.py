"""Text in, music out: `prepare` turns a request into a job, `run` turns jobs into songs, `__call__` does both.

The keyword names are those of diffusers' `AceStepPipeline`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from tqdm import tqdm

from acestep_jax.diffusion import denoise
from acestep_jax.diffusion.denoise import StepCallback
from acestep_jax.diffusion.solvers import STOCHASTIC
from acestep_jax.distributed import on_host, spans_processes
from acestep_jax.errors import InputError
from acestep_jax.inputs import ineffective, programs, sources
from acestep_jax.inputs.collate import (
    Batch,
    Schedule,
    check_sampling,
    collate,
    draw_retake_seeds,
    draw_seeds,
    initial_noise,
    sampling_schedule,
    warn_of_padding,
)
from acestep_jax.inputs.keywords import requests_of, takes
from acestep_jax.inputs.loop import loop_inputs
from acestep_jax.inputs.prepare import Job, prepare
from acestep_jax.inputs.prompt import PAD
from acestep_jax.inputs.settings import compat_of, defaults_of, settled
from acestep_jax.inputs.torch_arguments import from_torch
from acestep_jax.models.config import TransformerConfig
from acestep_jax.planner import timestamps
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.plans import describe_codes
from acestep_jax.planner.timestamps import Timestamps
from acestep_jax.planning import PlanningModel, split_planning
from acestep_jax.request import MAX_DURATION, MIN_DURATION, Arguments, Audio, Request, Sampling
from acestep_jax.settings import with_own_settings
from acestep_jax.song import AudioPipelineOutput, Song

NETWORKS = ("transformer", "condition_encoder", "text_encoder", "vae")  # what every song needs


class _Drawn(NamedTuple):
    """What is random in a padded batch of B songs."""

    seeds: list[int | None]
    retake_seeds: list[int | None]
    keys: jax.Array  # [B]
    noise: np.ndarray  # [B, frames, C] float32


class AceStepPipeline(PlanningModel):
    """A loaded model that generates songs. Text encoding, denoising and decoding are one compiled program each.

    `Job.program_key` identifies the programs that a song needs. A new batch size, number of steps or program key
    compiles once; prompts, seeds, timesteps, regions and scales are data and compile nothing. Use a pipeline from one
    thread at a time. Arguments of the constructor: see `LoadedModel`.
    """

    @takes(Arguments)
    def __call__(
        self,
        *,
        generator: Any = None,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
        **keywords: Any,
    ) -> AudioPipelineOutput:
        """Generate a song for each prompt, each `Request` or each `Plan`.

        Args:
            {arguments}
            generator: a `torch.Generator`, or one for each prompt, whose `initial_seed()` is used instead of `seed`.
                With `noise="torch"`, the noise is also the one that PyTorch draws.
            output_type: "np", or "latent" to skip decoding.
            callback_on_step_end: called after each step with its index, the time t at its beginning and the latents
                [B, frames, C] at its end. An exception that it raises ends the call.

        A list of prompts is a batch; every argument of a song may then be a list with one value for each prompt. With a
        single seed s, song i gets the seed s + i. The same seed gives the same song, by itself and in any batch.

        Returns:
            The songs, normalised to a peak of -1 dBFS. Repainted songs, and lego in regions, keep the level of their
            source instead, and equal it outside of the regions, sample for sample.

        Raises:
            InputError: if an argument is unknown, out of range, of the wrong shape, or not accepted by the task.
            OSError: if a sound file cannot be read.
        """
        requests, planning, sampling = requests_of(from_torch(keywords, generator))
        jobs = [self.prepare(request, sampling) for request in requests]  # errors come before planning
        prompts = keywords["prompt"] if isinstance(keywords["prompt"], list | tuple) else [keywords["prompt"]]
        finished = [i for i, prompt in enumerate(prompts) if isinstance(prompt, Plan)]
        planned = self.planned(requests, planning, sampling, finished=finished)
        jobs = [
            job if plan is None else self.prepare(request, sampling)
            for job, (request, plan) in zip(jobs, planned, strict=True)
        ]
        songs = self.run(jobs, sampling, output_type=output_type, on_step=callback_on_step_end)
        return AudioPipelineOutput(
            [dataclasses.replace(song, plan=plan) for song, (_, plan) in zip(songs, planned, strict=True)]
        )

    def prepare(
        self,
        request: Request,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    ) -> Job:
        """Read the files of a request, check it, and return the job, see `inputs.prepare`.

        Args:
            sampling: how the job will be run; its `compat` determines the defaults of the request.

        Raises:
            InputError: if the request cannot be fulfilled.
            OSError: if a sound file cannot be read.
        """
        self.need("vae")
        return prepare(request, self.configs, self.need("tokenizer"), sampling, self.sampling_defaults)

    @with_own_settings
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
                [B, frames, C] at its end. An exception that it raises ends the run.
            should_stop: called before each step; if it returns true, the run ends. With several processes, it must
                return the same value in all of them.

        Raises:
            InputError: if a job's task does not accept the sampling, a timestep is out of range, or a song has
                non-finite values.
            Cancelled: if `should_stop` returned true.
        """
        if output_type not in ("np", "latent"):
            advice = "; torch.from_numpy(song.audio) makes a tensor" if output_type == "pt" else ""
            raise InputError(f'output_type: expected "np" or "latent", found {output_type!r}{advice}')
        if not jobs:
            return []
        check_sampling(jobs, sampling)
        transformer, *_ = map(self.need, NETWORKS)
        given, sampling = sampling, self._settled(sampling)
        ineffective.warn_of_sampling(ineffective.Batch(jobs, given, sampling, transformer.config.turbo))
        schedule = sampling_schedule(sampling, turbo=transformer.config.turbo)
        padded = self._pad(jobs)
        batch = self._collate(padded, sampling)
        method = _method(jobs[0], batch, sampling, schedule, transformer.config)
        drawn = self._draw(jobs, padded, batch.frames, sampling)
        with self.on_mesh(), _progress_bar(len(schedule.times) + 1) as bar:
            bar.set_description("encoding")
            inputs, clean = self._encode(padded, batch, sampling, schedule, method, drawn)
            bar.update()
            bar.set_description("denoising")
            x = self._denoise(inputs, method, bar, on_step, should_stop)
            if sampling.latent_rescale != 1 or sampling.latent_shift != 0:
                x = x * np.float32(sampling.latent_rescale) + np.float32(sampling.latent_shift)
            latents = [row[: job.frames] for row, job in zip(np.asarray(on_host(x)), jobs, strict=False)]
            sources.check_songs(jobs, drawn.seeds, latents, "of the latents, after denoising,")
            audios: list[np.ndarray | None] = [None] * len(jobs)
            if output_type == "np":
                bar.set_description("decoding")
                audios = [*self._decode(jobs, batch, x, clean, drawn.seeds)]
            bar.update()
            bar.set_description("done")
        return [
            Song(
                audio=audio,
                latents=its_latents.copy(),
                sample_rate=self.sample_rate,
                seed=seed,
                retake_seed=retake_seed,
            )
            for audio, its_latents, seed, retake_seed in zip(
                audios, latents, drawn.seeds, drawn.retake_seeds, strict=False
            )
        ]

    def _pad(self, jobs: Sequence[Job]) -> list[Job]:
        """Return a batch padded for the mesh with copies of its last song. One song is replicated over the mesh."""
        multiple = 1 if self.mesh is None or len(jobs) == 1 else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return [*jobs, *[jobs[-1]] * (-len(jobs) % multiple)]

    def _collate(self, padded: Sequence[Job], sampling: Sampling) -> Batch:
        """Return the arrays of a batch; warn of padding that diffusers would attend to in another way."""
        if not sampling.attend_to_padding:
            return collate(padded)
        warn_of_padding(padded, self.need("condition_encoder").config.sliding_window)
        return collate(padded, pad=self.need("tokenizer").token_to_id(PAD) or 0)

    def _draw(self, jobs: Sequence[Job], padded: Sequence[Job], frames: int, sampling: Sampling) -> _Drawn:
        """Draw the seeds that were not given, and the initial noise."""
        joint = spans_processes(self.mesh)
        retake_seeds = draw_retake_seeds(jobs, joint=joint)
        retake_seeds += [retake_seeds[-1]] * (len(padded) - len(jobs))
        needed = sampling.solver in STOCHASTIC or padded[0].edited or sampling.posterior == "sample"
        seeds, keys = draw_seeds(padded, needed=needed, joint=joint)
        transformer = self.need("transformer")
        noise = initial_noise(
            padded,
            seeds,
            keys,
            sampling.noise,
            frames=frames,
            channels=transformer.config.audio_acoustic_hidden_dim,
            dtype=transformer.runtime.dtype,
            retake_seeds=retake_seeds,
        )
        return _Drawn(seeds, retake_seeds, keys, noise)

    def _encode(
        self,
        padded: Sequence[Job],
        batch: Batch,
        sampling: Sampling,
        schedule: Schedule,
        method: denoise.Method,
        drawn: _Drawn,
    ) -> tuple[denoise.Inputs, np.ndarray]:
        """Encode texts, references and sources; return the inputs of the loop, and the latents of the sources
        [B, frames, C] float32."""
        sample_keys = drawn.keys if sampling.posterior == "sample" else None
        with self.placement.stage(self.networks) as networks:
            latents = sources.source_latents(networks, padded, batch.frames, drawn.noise.shape[2], sample_keys)
            conditions = sources.conditions(
                networks,
                batch,
                sources.references(networks, padded, sample_keys),
                self._silent_timbre(padded, networks),
                attend_to_padding=bool(sampling.attend_to_padding),
            )
            jax.block_until_ready(conditions)
        inputs = loop_inputs(padded, batch, sampling, schedule, drawn.noise, latents, conditions, drawn.keys, method)
        return inputs, latents[0]

    def _decode(
        self, jobs: Sequence[Job], batch: Batch, x: jax.Array, clean: np.ndarray, seeds: Sequence[int | None]
    ) -> list[np.ndarray]:
        """Return the audio of each song, [channels, samples] float32; outside of its regions, that of its source."""
        with self.placement.stage(self.networks) as networks:
            made = on_host(programs.decode(networks["vae"], x, batch.lengths, ~batch.keeps_source))
            originals = sources.decoded_sources(networks, jobs, clean, batch.lengths)
        audios = [row[:, : job.samples] for row, job in zip(made, jobs, strict=False)]
        sources.check_songs(jobs, seeds, audios, "of the audio, after decoding,")
        config = self.need("vae").config
        return [
            sources.finished(job, audio, config, None if originals is None else originals[i])
            for i, (job, audio) in enumerate(zip(jobs, audios, strict=True))
        ]

    def _settled(self, sampling: Sampling) -> Sampling:
        """Return the sampling with the defaults of its `compat`, the variant and the checkpoint in place of None."""
        config = self.need("transformer").config
        return settled(sampling, config, defaults_of(sampling, config, self.sampling_defaults))

    def _silent_timbre(self, jobs: Sequence[Job], placed: Mapping[str, Any]) -> jax.Array | None:
        """Return the timbre of songs without a reference; None if each song has one."""
        is_used = any(job.reference is None and job.reference_latents is None for job in jobs)
        return self.silent_timbre.token(self.networks, placed) if is_used else None

    def _denoise(
        self,
        inputs: denoise.Inputs,
        method: denoise.Method,
        bar: Any,
        on_step: StepCallback | None,
        should_stop: Callable[[], bool] | None,
    ) -> jax.Array:
        """Return the latents [B, T, C] float32; in pieces if the loop is watched, which a progress bar does too."""
        # With several processes a bar must not matter: all have to run the same programs, and only the first has one.
        watched = on_step is not None or should_stop is not None or not bar.disable and jax.process_count() == 1
        with self.placement.stage(self.networks) as networks:
            used = self.placement.for_denoising(networks["transformer"]), networks["condition_encoder"]
            if watched:
                return denoise.denoise_in_pieces(
                    *used, inputs, method=method, on_step=on_step, should_stop=should_stop, progress=bar.update
                ).block_until_ready()
            x = denoise.denoise(*used, inputs, method=method).block_until_ready()
        bar.update(len(inputs.times) - 1)
        return x

    def describe(self, song: Audio | Sequence[int], **keywords: Any) -> Plan:
        """Return the planner's description of a song: caption, lyrics, tempo, key, language, and the audio codes.

        Args:
            song: a sound file, an array [channels, samples], or audio codes.
            keywords: fields of `Planning`.

        Raises:
            InputError: if there is no planner or no audio tokenizer, or the song cannot be read.
            OSError: if there is no such file.
        """
        requested, planning = split_planning(keywords)
        if requested:
            raise InputError(f"{next(iter(requested))}: a description comes from the song; leave it out")
        codes = song if isinstance(song, list | tuple) else self.song_to_codes(cast(Audio, song))
        with self.on_mesh():
            return describe_codes(self.planner, np.asarray(codes), planning)

    def timestamps(
        self,
        song: Song | Audio,
        request: Request | Plan,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    ) -> Timestamps:
        """Return timestamps of the lyrics' lines, and how well the song matches its lyrics.

        Args:
            song: a result of a pipeline, a sound file, or an array [channels, samples].
            request: the request or the plan (`song.plan`) that the song was made from; for any other song, a request
                with its caption and lyrics.
            sampling: how the song was sampled.

        Raises:
            InputError: if the request has no lyrics, the song has another length, or the alignment heads of this model
                are unknown, as for XL models.
            OSError: if there is no such file.
        """
        for name in NETWORKS:
            self.need(name)
        request = request.request() if isinstance(request, Plan) else request
        # A cover that starts late leaves steps out, but does not make the others longer.
        complete = dataclasses.replace(self._settled(sampling), cover_noise_strength=0.0, guidance_scale=1.0)
        times = sampling_schedule(complete, turbo=self.need("transformer").config.turbo).times
        with self.on_mesh(), self.placement.stage(self.networks) as networks:
            if isinstance(song, Song):
                latents = song.latents
            else:
                padded, frames = self._latents_of(networks, song)
                latents = padded[0, :frames]
            if request.audio_codes is None and request.src_audio is None and request.src_latents is None:
                seconds, rate = len(latents) / self.latents_per_second, self.latents_per_second
                if not MIN_DURATION <= seconds <= MAX_DURATION:
                    raise InputError(
                        f"song: expected {MIN_DURATION:g} to {MAX_DURATION:g} s of music, found {seconds:g} s"
                    )
                if math.ceil(seconds * rate) > len(latents):  # by rounding
                    seconds = math.nextafter(seconds, 0)
                request = dataclasses.replace(request, audio_duration=seconds)
            job = self.prepare(request, sampling)
            silent = self._silent_timbre([job], networks)
            return timestamps.align(networks, self.need("tokenizer"), job, latents, silent, steps=len(times) - 1)


def _method(
    first: Job, batch: Batch, sampling: Sampling, schedule: Schedule, config: TransformerConfig
) -> denoise.Method:
    """Return the static choices of the denoising loop. `first`: the first job; FlowEdit applies to all or none."""
    return denoise.Method(
        solver=sampling.solver,
        guidance=sampling.guidance if schedule.scale > 1 else None,
        blend=batch.plain is not None and sampling.cover_mode == "blend",
        euler_end=config.turbo and compat_of(sampling).turbo_ends_with_euler,
        wavelet=sampling.dcw_wavelet,
        edit_draws=sampling.flow_edit_n_avg if first.edited else 0,
    )


def _progress_bar(total: int) -> tqdm:
    return tqdm(total=total, unit="step", disable=None if jax.process_index() == 0 else True)
