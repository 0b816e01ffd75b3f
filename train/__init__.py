"""Training: preprocessing of songs, fine-tuning by flow matching, and an autoencoder from scratch."""
