"""Run directories: one of its own for every run, and the way back into one."""

import re
import time
from itertools import count
from pathlib import Path

from sandbox.errors import UserError

RUNS = Path("runs")
CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"  # of a finished run, to keep and share


def new_run_dir(name: str, parent: str | Path = RUNS) -> Path:
    """Create a directory that no other run has: time, name, and a counter where those clash.

    ``mkdir`` either creates or fails, so two runs started in the same second stay apart too.

    >>> new_run_dir("debug")  # doctest: +SKIP
    PosixPath('runs/20260131-174502-debug')
    """
    safe = re.sub(r"[^\w.-]+", "-", name)
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}"
    for number in count(1):
        path = Path(parent) / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("count() does not end")


def resume_point(path: str | Path) -> tuple[Path, Path]:
    """The run directory and the checkpoint meant by ``--resume PATH``.

    ``path`` is a run directory, whose last checkpoint is taken, or a checkpoint inside one.

    Raises:
        UserError: there is no checkpoint at the path, or no configuration to go on with.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint != Path(path) and (Path(path) / CONFIG).is_file():
        return Path(path), checkpoint
    for parent in checkpoint.resolve().parents:
        if (parent / CONFIG).is_file():
            return parent, checkpoint
    raise UserError(f"{path}: no {CONFIG} in the directories above it, so not part of a run")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``: itself, or the last one of a run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run directory")
    # Sharded checkpoints are directories with the same suffix.
    if path.is_file() or path.suffix == ".ckpt":
        return path
    found = sorted(path.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"{path}: no checkpoint in it; the run has not saved one yet")
    # Trainers that keep a rolling copy call it last; any other may be the best, or a post-mortem.
    rolling = [file for file in found if file.name.startswith("last")]
    return (rolling or found)[-1]


def find_weights(path: str | Path) -> Path:
    """The model at ``path``: a file, what a finished run exported, or its last checkpoint.

    Raises:
        UserError: there is none.
    """
    exported = Path(path) / WEIGHTS
    return exported if exported.is_file() else find_checkpoint(path)
