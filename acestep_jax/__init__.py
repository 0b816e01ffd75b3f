"""ACE-Step 1.5 music generation in JAX and Flax NNX."""

import importlib.metadata

from acestep_jax.distributed import make_mesh
from acestep_jax.errors import InputError
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.planner.plan import Plan
from acestep_jax.request import Planning, Request, Sampling
from acestep_jax.song import AudioPipelineOutput, Song

__all__ = [
    "AceStepPipeline",
    "AceStepTransformer1DModel",
    "AudioPipelineOutput",
    "InputError",
    "Plan",
    "Planning",
    "Request",
    "Sampling",
    "Song",
    "TransformerConfig",
    "make_mesh",
]

__version__ = importlib.metadata.version("acestep-jax")
