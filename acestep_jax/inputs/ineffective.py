"""Warnings about arguments that have no effect because of another argument or the model.

An argument counts as given if it differs from its default. Arguments that a task does not accept, or that contradict
each other, are errors, see `inputs.prepare` and `inputs.collate`; the tables here list those that would otherwise be
ignored silently.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from acestep_jax.arguments import arguments
from acestep_jax.diffusion.solvers import STOCHASTIC
from acestep_jax.request import Request, Sampling

if TYPE_CHECKING:
    from acestep_jax.inputs.prepare import Job

logger = logging.getLogger(__name__)

A = TypeVar("A")  # the effect depends on this: a request, or a batch


class Rule(NamedTuple, Generic[A]):
    """Some arguments, and the condition for their effect.

    acts: returns whether they have an effect.
    needs: description of the condition, for the message.
    """

    names: tuple[str, ...]
    acts: Callable[[A], bool]
    needs: str


class Batch(NamedTuple):
    """The facts that the effect of `Sampling` depends on.

    given: the sampling as given; settled: with defaults filled in, see `inputs.settings`.
    turbo: whether it is a turbo model, whose weights have guidance distilled into them.
    """

    jobs: "Sequence[Job]"
    given: Sampling
    settled: Sampling
    turbo: bool

    @property
    def edited(self) -> bool:
        """Whether sources are edited with FlowEdit."""
        return self.jobs[0].edited

    @property
    def guided(self) -> bool:
        """Whether there is guidance."""
        scale = self.settled.guidance_scale
        return not self.turbo and scale is not None and scale > 1

    @property
    def keeps_sources(self) -> bool:
        """Whether a song keeps its source outside of regions."""
        return any(job.keeps_source and not job.mask.all() for job in self.jobs)

    @property
    def follows_strength(self) -> bool:
        """Whether `repaint_strength` has an effect on how the source is kept."""
        own = self.given.repaint_injection_ratio, self.given.repaint_latent_crossfade_frames
        return self.keeps_sources and self.settled.repaint_mode == "balanced" and None in own

    @property
    def follows_mode(self) -> bool:
        """Whether `repaint_mode` has an effect on it."""
        own = self.given.repaint_injection_ratio, self.given.repaint_latent_crossfade_frames
        return self.keeps_sources and None in own

    @property
    def corrected(self) -> bool:
        """Whether steps are corrected in the wavelet domain."""
        return bool(self.settled.dcw_enabled) and not self.edited


_WITH_DCW = "DCW, which is on for turbo models and with dcw_enabled=True, but not with flow_edit_morph"

OF_REQUESTS: tuple[Rule[Request], ...] = (
    Rule(("retake_seed",), lambda request: request.retake_variance > 0, "retake_variance above 0"),
    Rule(("complete_track_classes",), lambda request: not request.track_name, "track_name to be left out"),
    Rule(
        ("track_name", "complete_track_classes"),
        lambda request: not request.instruction,
        "instruction to be left out, which replaces the one that names the tracks",
    ),
    Rule(
        ("global_caption",),
        lambda request: "a segment" not in (request.instruction or "").lower(),
        "an instruction for the whole song, not for a segment",
    ),
)
OF_SAMPLING: tuple[Rule[Batch], ...] = (
    Rule(("num_inference_steps", "shift"), lambda batch: batch.given.timesteps is None, "timesteps to be left out"),
    Rule(
        ("snap_timesteps",),
        lambda batch: batch.turbo and batch.given.timesteps is not None,
        "a turbo model and timesteps",
    ),
    Rule(
        ("guidance", "cfg_interval_start", "cfg_interval_end", "cfg_interval_in"),
        lambda batch: batch.guided,
        "guidance: a model that is not turbo, and guidance_scale above 1",
    ),
    Rule(
        ("cfg_interval_in",),
        lambda batch: batch.given.cfg_interval_start > 0 or batch.given.cfg_interval_end < 1,
        "cfg_interval_start or cfg_interval_end",
    ),
    Rule(
        ("cover_mode",),
        lambda batch: any(job.partial_cover for job in batch.jobs),
        "a cover with audio_cover_strength below 1",
    ),
    Rule(
        ("repaint_mode",),
        lambda batch: batch.follows_mode,
        "regions outside of which the source is kept, and repaint_injection_ratio or "
        "repaint_latent_crossfade_frames to be left out",
    ),
    Rule(
        ("repaint_strength",),
        lambda batch: batch.follows_strength,
        "regions outside of which the source is kept, repaint_mode=balanced, and repaint_injection_ratio or "
        "repaint_latent_crossfade_frames to be left out",
    ),
    Rule(
        ("repaint_injection_ratio", "repaint_latent_crossfade_frames"),
        lambda batch: batch.keeps_sources,
        "regions outside of which the source is kept",
    ),
    Rule(("dcw_mode", "dcw_scaler", "dcw_high_scaler", "dcw_wavelet"), lambda batch: batch.corrected, _WITH_DCW),
    Rule(("dcw_high_scaler",), lambda batch: batch.settled.dcw_mode == "double", "dcw_mode=double"),
    Rule(("dcw_wavelet",), lambda batch: batch.settled.dcw_mode != "pix", "another dcw_mode than pix"),
    Rule(("flow_edit_n_min", "flow_edit_n_max", "flow_edit_n_avg"), lambda batch: batch.edited, "flow_edit_morph=True"),
    Rule(
        ("posterior",),
        lambda batch: any(job.source is not None or job.reference is not None for job in batch.jobs),
        "a source or a reference that is sound",
    ),
    Rule(
        ("noise",),
        lambda batch: (
            not batch.edited and any(job.request.latents is None or job.request.retake_variance for job in batch.jobs)
        ),
        "noise drawn from a seed: no latents, and no flow_edit_morph",
    ),
)


def warn_of_request(request: Request) -> None:
    """Warn of each given field of a request that has no effect."""
    _warn(OF_REQUESTS, request, request)


def warn_of_sampling(batch: Batch) -> None:
    """Warn of each given field of a sampling that has no effect on any song of a batch."""
    _warn(OF_SAMPLING, batch.given, batch)
    jobs, sampling = batch.jobs, batch.settled
    draws = sampling.solver in STOCHASTIC or batch.edited or sampling.posterior == "sample"
    if not draws and any(job.request.seed is not None and job.request.latents is not None for job in jobs):
        _say("seed", "latents to be left out, which replace its noise")


def _warn(rules: Sequence[Rule[A]], values: Request | Sampling, facts: A) -> None:
    fields, said = arguments(type(values)), set()
    for rule in rules:
        for name in rule.names:
            given, default = getattr(values, name), fields[name][0].default
            if name not in said and not (given is default or given == default) and not rule.acts(facts):
                _say(name, rule.needs)
                said.add(name)


def _say(name: str, needs: str) -> None:
    logger.warning("%s: has no effect here; it needs %s", name, needs)
