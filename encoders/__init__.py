"""Pixels to patch features. Knows nothing of text, fusion or training."""
