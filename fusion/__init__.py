"""Patch features and text embeddings to what the backbone reads."""
