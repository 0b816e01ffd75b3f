"""ACE-Step 1.5 music generation in JAX and Flax NNX."""

from acestep_jax.config import TransformerConfig
from acestep_jax.errors import InputError
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.pipeline import AceStepPipeline, AudioPipelineOutput
from acestep_jax.request import Request
from acestep_jax.sharding import make_mesh

__all__ = [
    "AceStepPipeline",
    "AceStepTransformer1DModel",
    "AudioPipelineOutput",
    "InputError",
    "Request",
    "TransformerConfig",
    "make_mesh",
]
