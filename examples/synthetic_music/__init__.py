"""Procedurally composed music with captions, tempo and key: training data with exact labels and without copyright."""
