"""A model that the server offers: its properties, which do not need its weights, and how to load it."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.collate import check_sampling, sampling_schedule
from acestep_jax.inputs.prepare import Job, is_for_stems, prepare
from acestep_jax.inputs.prompt import prompt_text
from acestep_jax.inputs.settings import defaults_of, settled
from acestep_jax.io import checkpoint
from acestep_jax.models.alignment import alignment_heads
from acestep_jax.models.registry import SamplingDefaults
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.request import MAX_DURATION, Request, Sampling


class Model:
    """A native checkpoint under the name that clients use.

    Args:
        load: function that returns the loaded pipeline; None: `AceStepPipeline.from_pretrained(folder, **options)`.
        options: options of `from_pretrained`, such as dtype and mesh.
        planner: name of its planner; None: it has none.

    Raises:
        InputError: if the folder has no checkpoint.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        *,
        load: Callable[[], Any] | None = None,
        options: Mapping[str, Any] | None = None,
        planner: str | None = None,
    ):
        self.name, self.folder, self.planner = name, str(folder), planner
        manifest = checkpoint.read_manifest(self.folder)
        self.configs: Mapping[str, Any] = manifest.configs
        self._sampling = manifest.sampling
        self._tokenizer = checkpoint.load_tokenizer(self.folder)
        self.load = load or functools.partial(AceStepPipeline.from_pretrained, self.folder, **(options or {}))

    @property
    def turbo(self) -> bool:
        """Whether guidance is distilled into the weights."""
        return self.configs["transformer"].turbo

    @property
    def defaults(self) -> SamplingDefaults:
        """The defaults for unset fields of `Sampling`."""
        return defaults_of(Sampling(), self.configs["transformer"], self._sampling)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.configs["vae"].sampling_rate

    @property
    def takes_stems(self) -> bool:
        """Whether it was fine-tuned on stems, so that it takes a `global_caption`."""
        return is_for_stems(self.configs)

    @property
    def has_codes(self) -> bool:
        """Whether it converts songs to audio codes and back."""
        return self.configs.keys() >= {"audio_tokenizer", "audio_token_detokenizer"}

    @property
    def has_alignment(self) -> bool:
        """Whether its alignment heads are known, which timestamps of lyrics need."""
        try:
            alignment_heads(self.configs["transformer"])
        except InputError:
            return False
        return True

    @property
    def tasks(self) -> list[str]:
        """The tasks that it was trained for."""
        return [
            name
            for name, task in tasks.TASKS.items()
            if (task.turbo or not self.turbo) and (self.has_codes or not task.tokenized)
        ]

    def prepare(self, request: Request, sampling: Sampling) -> Job:
        """Read the files of a request and check it, see `inputs.prepare`."""
        return prepare(request, self.configs, self._tokenizer, sampling, self._sampling)

    def count_tokens(self, prompt: str, lyrics: str) -> dict[str, int]:
        """Return the number of tokens in the text encoder's inputs for the prompt and for the lyrics; 0 for an empty
        prompt."""
        asked = str(prompt_text(prompt, audio_duration=MAX_DURATION)) if prompt.strip() else ""
        return {
            "prompt": len(self._tokenizer.encode(asked).ids) if asked else 0,
            "lyrics": len(self._tokenizer.encode(lyrics).ids),
        }

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.configs["vae"].sampling_rate / self.configs["vae"].hop_length

    def seconds(self, sampling: Sampling) -> float:
        """Return the default duration of a song, in seconds."""
        return defaults_of(sampling, self.configs["transformer"], self._sampling).audio_duration

    def steps(self, job: Job, sampling: Sampling) -> int:
        """Return the number of steps of a song; raise InputError if its sampling settings do not match it."""
        check_sampling([job], sampling)
        config = self.configs["transformer"]
        full = settled(sampling, config, defaults_of(sampling, config, self._sampling))
        times, _, _ = sampling_schedule(full, turbo=config.turbo)
        return len(times) - 1
