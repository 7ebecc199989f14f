"""The contract of a task: a pure function from (split, index) to images with questions."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image as PILImage

Split = Literal["train", "val", "test", "heldout"]


@dataclass(frozen=True)
class Question:
    """One question about a sample, its answer, and the question type it is scored under.

    The answer is what training spells out; empty where only a benchmark's owner knows it.
    """

    text: str
    answer: str
    kind: str
    # The answers a reader could still give who knows what is *present* in the picture but not
    # what the question binds together; the guess-among-present baseline draws from these.
    present: tuple[str, ...] = ()
    # What a benchmark knows besides; left out of the representation, which identities hash.
    answers: tuple[str, ...] = field(default=(), repr=False)  # all that it accepts
    id: str = field(default="", repr=False)  # its own name for the question
    choices: tuple[str, ...] = field(default=(), repr=False)  # options of multiple choice


@dataclass(frozen=True)
class Sample:
    """Images (or frames) that share one prompt prefix, and the questions asked about them.

    ``content`` is a hash of what is drawn or stored, not of how it was sampled: two samples with
    the same content show the same thing. Splits are disjoint in it. A sample without images stands
    behind its text.
    """

    images: tuple[PILImage.Image, ...]
    questions: tuple[Question, ...]
    content: str
    times: tuple[float, ...] | None = None  # seconds, when the images are frames of a video
    labels: tuple[str, ...] | None = None  # what to call each image: text that stands before it
    text: str | None = None  # all that the images show, in words: a caption, and a textual twin

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"{len(self.labels)} labels for {len(self.images)} images")


class Task(ABC):
    """A source of samples. Every constructor argument is a plain value, so YAML can name it.

    Arguments are recorded in ``init_args``, defaults included, so that a curriculum can make the
    same task with one of them changed.

    ``sample`` must be a pure function of the constructor arguments, split and index: any worker,
    any rank and any resumed run sees the same example. Splits: ``train``, ``val`` and ``test`` are
    drawn alike but disjoint by content; ``heldout`` holds combinations that never occur in the
    other three (out-of-distribution).
    """

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Task":
        """Record the arguments before ``__init__`` of the subclass sees them."""
        self = super().__new__(cls)
        # Partial: pickle makes an object without arguments, and then restores these.
        bound = inspect.signature(cls).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        self.init_args = dict(bound.arguments)
        return self

    @abstractmethod
    def size(self, split: Split) -> int | None:
        """How many samples the split holds; None when it is generated without end.

        A split that the task does not offer has size 0.
        """

    @abstractmethod
    def sample(self, split: Split, index: int) -> Sample:
        """The sample at ``index`` (0-based) of ``split``.

        Raises:
            IndexError: index is not below a finite size.
        """

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        """The questions of the sample at ``index``, for who does not need its images.

        A task that knows them without drawing or decoding anything overrides this.

        Raises:
            IndexError: index is not below a finite size.
        """
        return self.sample(split, index).questions

    @abstractmethod
    def identity(self) -> str:
        """A short hash that changes when the data does; stored with every run."""
