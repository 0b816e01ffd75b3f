"""Programs that use acestep-jax, run with `python -m` from the repository root."""
