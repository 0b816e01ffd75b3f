"""Between PyTorch checkpoints of ACE-Step 1.5 and the native one: `python -m convert --help`."""
