"""Prompts, generated tasks and benchmarks, and their way into batches. Imports no model code."""
