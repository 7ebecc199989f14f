"""Tasks told in words: for a language model that never sees, and for captions.

A generated sample has a textual twin: all that its images show, in words (``Sample.text``). A model
trained on twins alone can reason about scenes that it has never seen; frozen, it teaches a vision
encoder what to tell it (``sandbox.train.align``).
"""

from dataclasses import replace

from sandbox.data.generated import fingerprint
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.errors import UserError

REQUEST = "Describe the picture."


def words_of(sample: Sample) -> str:
    """What the sample's images show, in words.

    Raises:
        UserError: its task does not tell.
    """
    if not sample.text:
        raise UserError(f"sample {sample.content} has no text: its task does not tell in words")
    return sample.text


class _View(Task):
    """Another task's samples, shown in another way."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def size(self, split: Split) -> int | None:
        """As many as the task has."""
        return self.task.size(split)

    def identity(self) -> str:
        """A short hash of the task's, and of the way."""
        return fingerprint(type(self).__name__, REQUEST, self.task.identity())


class InWords(_View):
    """Another task's samples without their images, told in words instead.

    Args:
        task: whose samples have a text.
    """

    def sample(self, split: Split, index: int) -> Sample:
        """The textual twin of the task's sample.

        Raises:
            UserError: it has none.
        """
        sample = self.task.sample(split, index)
        return replace(sample, images=(), times=None, labels=None, text=words_of(sample))


class Described(_View):
    """Another task whose training samples are to be described, too.

    The description is an answer like any other: it is the question type ``caption``.

    Args:
        task: whose samples have a text.
    """

    def sample(self, split: Split, index: int) -> Sample:
        """The task's sample, with one question more where it is for training.

        Raises:
            UserError: it has no text.
        """
        sample = self.task.sample(split, index)
        if split != "train":
            return sample
        caption = Question(REQUEST, words_of(sample), "caption")
        return replace(sample, questions=(caption, *sample.questions))
