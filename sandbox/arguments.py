"""Values on the command line, checked: each function reads one, as argparse's ``type`` asks."""

import argparse
from itertools import pairwise


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


def tokens(text: str) -> int:
    """How many tokens: at least 1, and at most what an index can count."""
    if (n := positive(text)) > 10**12:
        raise argparse.ArgumentTypeError(f"must be at most 10^12 tokens, got '{text}'")
    return n


def seeds(text: str) -> list[int]:
    """Seeds such as 0,1."""
    if not all(seed.isdecimal() for seed in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 0,1, got '{text}'")
    return list(map(int, text.split(",")))


def names(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",")]


def seconds(text: str) -> list[float]:
    """Points of time that increase, such as 0.5,1,2."""
    try:
        times = list(map(float, text.split(",")))
    except ValueError:
        times = [-1.0]
    if times[0] < 0 or not all(a < b for a, b in pairwise([*times, float("inf")])):
        raise argparse.ArgumentTypeError(f"must be seconds that increase, as 0.5,1,2, got '{text}'")
    return times


def number(
    text: str, *, rule: str, least: float | None = None, below: float = float("inf")
) -> float:
    """A number above 0, or from ``least`` on, and below ``below``; ``rule`` says so in words."""
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not (found > 0 if least is None else found >= least) or not found < below:
        raise argparse.ArgumentTypeError(f"must be {rule}, got '{text}'")
    return found
