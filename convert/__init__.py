"""Conversion of ACE-Step 1.5 between PyTorch and the native format: `acestep-jax convert --help`."""
