"""From words to a plan of a song, by the 5 Hz language model: metadata, caption, lyrics and audio codes."""
