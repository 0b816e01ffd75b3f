"""The parts of the objective, each compiled on its own: the tests of the objective and of a step share the programs."""

import jax

from acestep_jax.train import objective

draw = jax.jit(objective.draw, static_argnums=(2, 3))
encode = jax.jit(objective.encode_condition)
context = jax.jit(objective.context_latents)
