"""The planner: the 5 Hz language model turns words into a plan of metadata, caption, lyrics and audio codes."""
