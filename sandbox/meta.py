"""Modules without memory: their names and shapes, on torch's meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_memory() -> Iterator[None]:
    """What is built herein has weights on the meta device, where they take no memory and no time.

    Buffers made with an explicit device are real.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Draws no random numbers: to do so on the meta device, torch imports its compiler, seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            tensor = args[0] if args else kwargs["tensor"]  # a method, or of torch.nn.init
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
