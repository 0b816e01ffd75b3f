"""ACE-Step 1.5 music generation in JAX and Flax NNX."""
