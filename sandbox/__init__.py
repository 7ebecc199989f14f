"""Compose, train and measure early-fusion multimodal models."""
