"""Examples (one row) and batches (rows stacked), and the way from one to the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a label that carries no loss
PADDING = -1  # the document id of padding


@dataclass(frozen=True)
class Example:
    """One row of a batch as int64 arrays of length T, before padding.

    Attributes:
        tokens: token ids.
        labels: the token that each place must predict (already shifted), or ``IGNORE``.
        positions: distance from the start of the row's document; branches restart at the trunk's
            end, so every question sees itself right behind the image.
        branches: 0 for the trunk that all of the row may look back on, k > 0 for the k-th branch,
            visible to itself alone (several questions share one image prefix).
        answers: for labelled places, which answer of the row (0-based) they spell; else -1.
        patches: True where the token is the placeholder of an image feature.
        kinds: the question type of each answer.
        tiles: uint8 ``[n, 3, S, S]``, in the order of their placeholders.
        tile_starts: int64 ``[n]``, the place of the first token of each tile's image span: the
            ``<|image|>`` token itself, where a fusion takes no placeholders.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    answers: np.ndarray
    patches: np.ndarray
    kinds: tuple[str, ...]
    tiles: np.ndarray
    tile_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class Places(NamedTuple):
    """Where tokens of interest stand, found on the host before a batch is copied to a device.

    A place is ``b * T + t``. Found on a GPU, each of them would make the host wait for it.

    Attributes:
        real: int64 ``[M]``, tokens that are no padding; None when there is no padding.
        labelled: int64 ``[n]``, tokens with a label.
        placeholders: int64, tokens that stand for an image feature.
        tokens: M.
        placeholder_counts, tile_counts: placeholders and tiles of each row.
        ordered: whether tiles are in the order of rows and start inside them, left to right.
    """

    real: Tensor | None
    labelled: Tensor
    placeholders: Tensor
    tokens: int
    placeholder_counts: tuple[int, ...]
    tile_counts: tuple[int, ...]
    ordered: bool


@dataclass  # not frozen: Lightning converts precision field by field
class Batch:
    """Rows stacked for the model. ``documents`` and ``branches`` are None where they say nothing.

    Attributes:
        tokens, labels, positions, answers: int64 ``[B, T]``, as in ``Example``; ``answers`` are
            numbered through the whole batch.
        patches: bool ``[B, T]``.
        documents: int64 ``[B, T]``, tokens see only their own document, padding is ``PADDING``;
            None when each row is one document without padding.
        branches: int64 ``[B, T]``, see ``Example``; None when every row is a plain sequence.
        tiles: uint8 ``[N, 3, S, S]``, of all rows, in the order of their placeholders.
        tile_rows: int64 ``[N]``, the row that each tile belongs to.
        tile_starts: int64 ``[N]``, where in its row the image of each tile begins.
        kinds: the question type of each answer of the batch.
        name: where the batch comes from (split and sample numbers), for error messages.
        found: ``places``, once they are known. Whoever edits tensors in place sets it to None.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    answers: Tensor
    patches: Tensor
    tiles: Tensor
    tile_rows: Tensor
    tile_starts: Tensor
    documents: Tensor | None = None
    branches: Tensor | None = None
    kinds: tuple[str, ...] = ()
    name: str = ""
    found: Places | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, tokens: Tensor, **parts: Any) -> "Batch":
        """Rows of bare tokens, int64 ``[B, T]``, without labels; ``parts`` are other fields.

        Tiles belong to the first row and are seen from its start, unless ``parts`` say otherwise.

        >>> Batch.of(tokens, patches=tokens == 9, tiles=tiles, tile_rows=rows)  # doctest: +SKIP
        """
        B, T = tokens.shape
        parts.setdefault("tiles", tokens.new_zeros((0, 3, 0, 0), dtype=torch.uint8))
        first = tokens.new_zeros(len(parts["tiles"]))
        defaults = {
            "labels": torch.full_like(tokens, IGNORE),
            "positions": torch.arange(T, device=tokens.device).expand(B, T),
            "answers": torch.full_like(tokens, -1),
            "patches": torch.zeros_like(tokens, dtype=torch.bool),
            "tile_rows": first,
            "tile_starts": first,
        }
        return cls(tokens, **(defaults | parts))

    @property
    def places(self) -> Places:
        """Where its real, labelled and placeholder tokens are; found at first use, then kept."""
        if self.found is None:
            B, T = self.tokens.shape
            real = None
            if self.documents is not None:
                real = (self.documents >= 0).flatten().nonzero().squeeze(1)
                if bool(((self.labels != IGNORE) & (self.documents < 0)).any()):
                    raise ValueError(f"{self.name or 'the batch'}: labels stand on padding")
            rows = self.tile_rows
            self.found = Places(
                real=None if real is None or len(real) == B * T else real,
                labelled=(self.labels != IGNORE).flatten().nonzero().squeeze(1),
                placeholders=self.patches.flatten().nonzero().squeeze(1),
                tokens=B * T if real is None else len(real),
                placeholder_counts=tuple(self.patches.sum(1).tolist()),
                tile_counts=tuple(rows.clamp(0, B - 1).bincount(minlength=B).tolist()),
                ordered=_in_order(rows, self.tile_starts, B, T),
            )
        return self.found

    @property
    def placeholders(self) -> Tensor:
        """Places of the placeholders, see ``places``."""
        return self.places.placeholders

    @property
    def placeholder_counts(self) -> tuple[int, ...]:
        """Placeholders of each row."""
        return self.places.placeholder_counts

    @property
    def tile_counts(self) -> tuple[int, ...]:
        """Tiles of each row."""
        return self.places.tile_counts

    @property
    def ordered(self) -> bool:
        """Whether tiles are in the order of rows and start inside them, left to right."""
        return self.places.ordered

    @property
    def real_tokens(self) -> int:
        """The number of tokens without padding."""
        return self.places.tokens

    def answered(self, correct: Tensor) -> Tensor:
        """Whether each answer is right in every token: bool ``[len(kinds)]``.

        ``correct`` is bool ``[B, T]``, True where the label was the likeliest token. All tokens
        being likeliest given the true ones before them is the same as greedy decoding spelling
        out just this answer.
        """
        labelled = self.places.labelled
        spelled = self.answers.flatten()[labelled] + 1  # 0: labelled, but of no answer
        missed = torch.zeros(len(self.kinds) + 1, dtype=torch.float32, device=correct.device)
        missed.index_add_(0, spelled, (~correct.flatten()[labelled]).float())
        return missed[1:] == 0

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Batch":
        """The same batch with every tensor on ``device``.

        ``non_blocking`` lets the host go on meanwhile. By default it does so for tensors in
        page-locked memory: Lightning asks for it where it copies bare tensors, and not here.
        """
        return self._each(partial(moved, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU can overlap."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        batch = Batch(**{f.name: changed(getattr(self, f.name)) for f in fields(self) if f.init})
        batch.found = Places(*map(changed, self.places))
        return batch


def moved(tensor: Tensor, device: torch.device | str, non_blocking: bool | None) -> Tensor:
    """The tensor on ``device``; by default the host goes on meanwhile if it is page-locked."""
    go_on = tensor.is_pinned() if non_blocking is None else non_blocking
    return tensor.to(device, non_blocking=go_on)


def _in_order(rows: Tensor, starts: Tensor, B: int, T: int) -> bool:
    """Whether tiles name tokens of B rows of T tokens, row by row and from left to right."""
    if len(rows) != len(starts):
        return False
    inside = (rows >= 0) & (rows < B) & (starts >= 0) & (starts < T)
    return bool(inside.all() and ((rows * T + starts).diff() >= 0).all())


def collate(examples: Sequence[Example], *, name: str = "") -> Batch:
    """Stack examples into rows padded on the right, one document a row."""
    return pack([[example] for example in examples], name=name)


def pack(rows: Sequence[Sequence[Example]], *, name: str = "") -> Batch:
    """Stack rows of one or more examples each; an example's tokens never see another's.

    Returns:
        A batch of ``len(rows)`` rows, as long as the longest of them.
    """
    B, T = len(rows), max(sum(len(e) for e in row) for row in rows)
    empty = {"tokens": 0, "labels": IGNORE, "positions": 0, "branches": 0, "answers": -1}
    columns = {key: np.full((B, T), fill, dtype=np.int64) for key, fill in empty.items()}
    patches = np.zeros((B, T), dtype=bool)
    documents = np.full((B, T), PADDING, dtype=np.int64)
    tiles, tile_rows, tile_starts, kinds = [], [], [], list[str]()
    for b, row in enumerate(rows):
        start = 0
        for d, example in enumerate(row):
            span = slice(start, start + len(example))
            for key in empty:
                columns[key][b, span] = getattr(example, key)
            columns["answers"][b, span] += np.where(example.answers >= 0, len(kinds), 0)
            patches[b, span] = example.patches
            documents[b, span] = d
            tiles.append(example.tiles)
            tile_rows += [b] * len(example.tiles)
            tile_starts.append(start + example.tile_starts)
            kinds += example.kinds
            start += len(example)
    as_tensor = torch.from_numpy
    branches = columns.pop("branches")
    values: dict[str, Any] = {key: as_tensor(column) for key, column in columns.items()}
    batch = Batch(
        **values,
        patches=as_tensor(patches),
        tiles=as_tensor(np.concatenate(tiles)),
        tile_rows=torch.tensor(tile_rows, dtype=torch.int64),
        tile_starts=as_tensor(np.concatenate(tile_starts)),
        documents=as_tensor(documents) if documents.any() else None,
        branches=as_tensor(branches) if branches.any() else None,
        kinds=tuple(kinds),
        name=name,
    )
    assert batch.places  # found by the process that loads, not by the one that trains
    return batch
