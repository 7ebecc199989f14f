"""What tests of exact resume share: all that a checkpoint holds, compared bit by bit."""

from pathlib import Path
from typing import Any

import torch

from sandbox.checkpoint import KEY


def final(folder: Path) -> dict[str, Any]:
    """All that a run's last checkpoint holds, but for file names and the seed of the session."""
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    del content["callbacks"], content[KEY]["seed"]
    return content


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states are not the same, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, type(a)) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]
