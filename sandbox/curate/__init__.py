"""Captions from JSONL shards to a balanced choice of them. Imports no model code, and no torch."""
