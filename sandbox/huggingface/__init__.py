"""Transformers' checkpoints: what their configurations, tensor names and files mean here."""
