"""Work that several processes share out: each does a part of it, and all get all results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that work together, and which of them this is; by default one alone."""

    rank: int = 0
    count: int = 1

    def each(self, items: Sequence[Item], do: Callable[[Item], Result]) -> list[Result]:
        """The result of ``do`` for every item, in their order, on every process.

        Processes take turns, so each does nearly as many items; results must be picklable. All
        processes must call this, with the same items. They wait for each other.
        """
        mine = [do(item) for item in items[self.rank :: self.count]]
        if self.count == 1:
            return mine
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return [everyone[n % self.count][n // self.count] for n in range(len(items))]
