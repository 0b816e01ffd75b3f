"""ACE-Step 1.5 music generation in JAX and Flax NNX."""

from acestep_jax.distributed import make_mesh
from acestep_jax.errors import InputError
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.pipeline import AceStepPipeline, AudioPipelineOutput
from acestep_jax.request import Request

__all__ = [
    "AceStepPipeline",
    "AceStepTransformer1DModel",
    "AudioPipelineOutput",
    "InputError",
    "Request",
    "TransformerConfig",
    "make_mesh",
]
