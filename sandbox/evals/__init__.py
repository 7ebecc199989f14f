"""Comparing answers with the truth."""
