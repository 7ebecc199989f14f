# Everything a contributor runs, by name. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help setup test slow gpu lint format types quickstart bench doctor ci clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup:  ## install everything, and the git hooks
	uv sync
	uv run pre-commit install

test:  ## the default tests
	uv run pytest

slow:  ## the tests that take more than a few seconds each
	uv run pytest -m slow

gpu:  ## the tests that need a CUDA device
	uv run pytest -m gpu

lint:  ## what ruff finds, and whether it would format differently
	uv run ruff check
	uv run ruff format --check

format:  ## format, and mend what ruff can mend by itself
	uv run ruff check --fix
	uv run ruff format

types:  ## check the types of the three rooms
	uv run mypy

quickstart:  ## train a tiny model, and question it
	uv run sandbox quickstart

bench:  ## our backbone against transformers: a table, a picture, every sample
	uv run python experiments/bench.py

doctor:  ## check the installation
	uv run sandbox doctor

ci:  ## what continuous integration runs
	bash .ci/run

clean:  ## remove caches and build products; runs/ stays
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
