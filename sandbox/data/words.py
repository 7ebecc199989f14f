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

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        """Those that the task asks."""
        return self.task.questions_of(split, index)

    def identity(self) -> str:
        """A short hash of the task's, and of the way."""
        return fingerprint(type(self).__name__, REQUEST, self.task.identity())


class InWords(_View):
    """Another task's samples without their images, told in words instead: all, or some in training.

    What binds a name to what stands behind it is learned sooner from words than from pixels, and
    then serves both (experiments/LOG.md).

    Args:
        task: whose samples have a text.
        share: of the training samples that are told. Below 1, evaluation shows images.
        most_images: training samples of more images than these are told in any case.

    Raises:
        UserError: the share is not above 0 and at most 1.
    """

    def __init__(self, task: Task, share: float = 1.0, most_images: int | None = None) -> None:
        super().__init__(task)
        if not 0 < share <= 1:
            raise UserError(f"share must be above 0 and at most 1, got {share}")
        self.share = share
        self.most_images = most_images

    def sample(self, split: Split, index: int) -> Sample:
        """The textual twin of the task's sample, or the sample itself.

        Raises:
            UserError: it has no text.
        """
        sample = self.task.sample(split, index)
        many = self.most_images is not None and len(sample.images) > self.most_images
        told = self.share == 1 or (split == "train" and (many or self._told(index)))
        if not told:
            return sample
        return replace(sample, images=(), times=None, labels=None, text=words_of(sample))

    def _told(self, index: int) -> bool:
        """Whether so far more are due than were told: every n-th sample for a share of 1/n."""
        return int((index + 1) * self.share) > int(index * self.share)

    def identity(self) -> str:
        """A short hash of the task's, and of what is told."""
        return fingerprint(super().identity(), self.share, self.most_images)


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

    def questions_of(self, split: Split, index: int) -> tuple[Question, ...]:
        """Those that the task asks and, where it is for training, what the images show.

        Raises:
            UserError: it has no text.
        """
        # Only the sample itself tells the answer to the further one.
        return (
            self.sample(split, index).questions
            if split == "train"
            else super().questions_of(split, index)
        )
