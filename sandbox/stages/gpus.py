"""The GPUs of this machine, shared out among runs side by side."""

import os
from collections.abc import Sequence

from sandbox.errors import UserError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """The GPUs that this program may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Where the variable is set, its own names: numbers, UUIDs or MIG instances, up to the first that
    is empty or -1, as CUDA reads it. torch counts without a CUDA context, so this program takes no
    memory of a GPU.
    """
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get(VARIABLE)
    if given is None or not count:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in given.split(",")]
    end = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    # CUDA shows a process one MIG instance at most, so torch's count says nothing of the others.
    return names[:end] if names[0].startswith("MIG-") else names[: min(end, count)]


def places(gpus: Sequence[str], at_once: int, per_run: float | None = None) -> list[str]:
    """The GPUs of each run that has room, as values of ``CUDA_VISIBLE_DEVICES``.

    >>> places(["0", "1", "2", "3"], at_once=2), places(["0", "1"], at_once=3)
    (['0,1', '2,3'], ['0', '1'])
    >>> places(["0", "1"], at_once=3, per_run=0.5), places(["0", "1"], at_once=3, per_run=0)
    (['0', '1', '0'], ['', '', ''])

    Args:
        gpus: those there are.
        at_once: how many runs are wanted side by side.
        per_run: GPUs of each, or the share of one that it takes: 0.5 puts two runs on each, 0 all
            on the CPU. By default an even share of all, and at least one.

    Returns:
        At most ``at_once`` places, neighbours on different GPUs; none where there are no GPUs.

    Raises:
        UserError: there are fewer, or the number is negative, or neither whole nor a share of one.
    """
    each = max(1, len(gpus) // at_once) if per_run is None else per_run
    if each < 0:
        raise UserError(f"--gpus-per-run {each:g}: must be 0 or more")
    if each > len(gpus) and per_run is not None:
        raise UserError(f"--gpus-per-run {each:g}: torch sees {len(gpus)} GPUs on this machine")
    if each > 1 and each != int(each):
        raise UserError(f"--gpus-per-run {each:g}: must be a whole number, or a share below 1")
    if not gpus:
        return []
    if each == 0:
        return [""] * at_once
    if each < 1:
        return ([*gpus] * int(1 / each + 1e-9))[:at_once]
    size = int(each)
    found = [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]
    return found[:at_once]
