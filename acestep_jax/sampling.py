"""How songs are sampled: the settings that all songs of a batch share, and what they mean for a variant."""

import dataclasses
import logging
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from acestep_jax.diffusion.guidance import GUIDANCE
from acestep_jax.diffusion.noise import gpu_threads
from acestep_jax.diffusion.schedule import custom_schedule, late_start, schedule
from acestep_jax.diffusion.solvers import SOLVERS
from acestep_jax.errors import InputError, check_number, check_text

logger = logging.getLogger(__name__)

COVER_MODES = ("switch", "blend")
INTERVALS = ("t", "progress")
GUIDANCE_SCALES = {"small": 3.0}  # of variants for which 7 is too much


class Schedule(NamedTuple):
    """The numbers of a sampling."""

    times: np.ndarray  # [N + 1] float32
    guided: np.ndarray  # [N + 1] bool, at which of them guidance acts
    guidance_scale: float  # 1: no guidance at all


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The fields are the arguments of `AceStepPipeline.__call__` that hold for a whole batch.

    num_inference_steps, guidance_scale, shift: None: the variant's own, 8 steps, no guidance and shift 3 for turbo; 50
        steps, guidance 7 and shift 1 for base and sft; 50, 3 and 1 for the small model.
    timesteps: falling times within (0, 1], instead of num_inference_steps and shift.
    solver: euler, heun, ab2, ab3, sde or sde_linear; guidance: apg, adg or cfg. See `acestep_jax.diffusion.solvers`.
    cfg_interval_start, cfg_interval_end: guidance acts while start <= t <= end, with cfg_interval_in "t" as in
        ACE-Step, or start <= 1 - t <= end, with "progress" as in diffusers; steps outside take as long as those within.
    cover_mode: what an audio_cover_strength s below 1 means: "switch" turns to text to music after s of the steps, as
        in ACE-Step; "blend" mixes its velocity in with weight 1 - s, as in diffusers.
    cover_noise_strength: 0 to 1; covers start from their source with noise, at the time nearest to one minus this.
    repaint_injection_ratio: for this part of the steps, what is not repainted is put back after each step.
    noise: "jax", or "torch" for what PyTorch draws on a GPU from the same seed, "torch:A100" on this GPU where songs
        are longer than 25.6 s, see `acestep_jax.diffusion.noise`.
    attend_to_padding: whether the padding of shorter texts in a batch counts, as it does in diffusers; exactly so while
        lyrics differ by no more tokens than the window of the lyric encoder, 128.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    timesteps: Sequence[float] | None = None
    solver: str = "euler"
    guidance: str = "apg"
    cfg_interval_start: float = 0.0
    cfg_interval_end: float = 1.0
    cfg_interval_in: str = "t"
    cover_mode: str = "switch"
    cover_noise_strength: float = 0.0
    repaint_injection_ratio: float = 0.0
    noise: str = "jax"
    attend_to_padding: bool = False

    def __post_init__(self):
        """Raises InputError if a value is none that there is."""
        for name in ("solver", "guidance", "cfg_interval_in", "cover_mode", "noise"):
            check_text(name, getattr(self, name))
        names = ["cfg_interval_start", "cfg_interval_end", "cover_noise_strength", "repaint_injection_ratio"]
        for name in names + [name for name in ("guidance_scale", "shift") if getattr(self, name) is not None]:
            check_number(name, getattr(self, name))
        if self.num_inference_steps is not None:
            check_number("num_inference_steps", self.num_inference_steps, whole=True)
        if self.timesteps is not None:
            if isinstance(self.timesteps, np.ndarray):
                object.__setattr__(self, "timesteps", tuple(self.timesteps.tolist()))
            if not isinstance(self.timesteps, list | tuple):
                raise InputError(f"timesteps: expected a list of numbers, found {self.timesteps!r}")
            for t in self.timesteps:
                check_number("timesteps", t)
            object.__setattr__(self, "timesteps", tuple(self.timesteps))
        if self.noise != "jax":
            gpu_threads(self.noise)
        _check_choice("solver", self.solver, SOLVERS)
        _check_choice("guidance", self.guidance, GUIDANCE)
        _check_choice("cfg_interval_in", self.cfg_interval_in, INTERVALS)
        _check_choice("cover_mode", self.cover_mode, COVER_MODES)
        for name in ("cover_noise_strength", "repaint_injection_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected 0 to 1, found {getattr(self, name)}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise InputError(f"guidance_scale: expected a number of at least 0, found {self.guidance_scale}")
        start, end = self.cfg_interval_start, self.cfg_interval_end
        if not 0.0 <= start <= end <= 1.0:
            raise InputError(
                f"cfg_interval_start, cfg_interval_end: expected 0 <= start <= end <= 1, found {start} and {end}"
            )

    @property
    def draws_noise(self) -> bool:
        """Whether the solver does."""
        return self.solver in ("sde", "sde_linear")

    def schedule(self, turbo: bool, variant: str = "base") -> Schedule:
        """For a variant. Raises InputError if the steps, the shift or the times are out of range."""
        if self.timesteps is not None:
            times = custom_schedule(self.timesteps)
        else:
            steps, shift = (8, 3.0) if turbo else (50, 1.0)
            times = schedule(
                steps if self.num_inference_steps is None else self.num_inference_steps,
                shift if self.shift is None else self.shift,
            )
        if self.cover_noise_strength:
            times = late_start(times, 1 - self.cover_noise_strength)
        # In double precision, because a step may lie right on a border.
        t = times.astype(np.float64)
        place = t if self.cfg_interval_in == "t" else 1.0 - t
        guided = (self.cfg_interval_start <= place) & (place <= self.cfg_interval_end)
        scale = self.guidance_scale
        if scale is None:
            scale = 1.0 if turbo else GUIDANCE_SCALES.get(variant, 7.0)
        elif turbo and scale > 1:
            logger.warning("guidance_scale %s is ignored: guidance is distilled into turbo models", scale)
            scale = 1.0
        return Schedule(times, guided, float(scale))


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
