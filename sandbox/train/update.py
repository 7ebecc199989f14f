"""One update over several processes and micro-batches, as if one process had read all at once.

Lightning divides the loss of each of k micro-batches by k, and DDP takes the mean of the gradients
of W processes: both are right only where all have equally many labelled tokens. So a loss that is a
mean over n labelled tokens is multiplied by n before the backward pass, and when the gradients of
the update are complete they are multiplied by ``W k / N``, where N is the sum of n.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from lightning import Trainer
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sums:
    """Named sums over the micro-batches of an update, and over processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's; the names are the same on every process."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> dict[str, Tensor]:
        """The sums so far, which start anew."""
        taken, self._sums = self._sums, {}
        return taken


def over_processes(trainer: Trainer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes of tensors of any shape, in fp32 and one collective."""
    if trainer.world_size == 1:
        return dict(values)
    sums = torch.cat([value.float().flatten() for value in values.values()])
    dist.all_reduce(sums)  # Lightning's own would have all processes wait for each other first
    parts = sums.split([value.numel() for value in values.values()])
    return {n: s.view_as(values[n]) for n, s in zip(values, parts, strict=True)}


def reaching(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The same loss, whose backward pass also gives ``parameters`` a gradient: zeros.

    DDP waits until every parameter has one, on every process, and a batch without images has none
    for the encoder and the fusion.
    """
    return _Reaching.apply(loss, *parameters)


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)
