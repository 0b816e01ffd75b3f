"""Fine-tuning by flow matching: a folder of songs to a folder of data, and from there to weights or an adapter."""
