"""Prompts of text, images and video frames, and their encoding to tokens, labels and tiles.

One prompt object serves every fusion: a fusion only says how many placeholders a tile takes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from fusion.layout import PATCH, frame_mark, image_span
from sandbox.data.batch import IGNORE, Example
from sandbox.data.task import Sample
from sandbox.data.tiling import cut
from sandbox.errors import UserError
from sandbox.tokenizer import Tokenizer

Loss = Literal["answer", "text"]

MAX_IMAGES = 48  # of one prompt: as many as Llama 4 saw in pre-training (Meta's announcement)


@dataclass(frozen=True)
class Image:
    """One image of a prompt."""

    pixels: PILImage.Image


@dataclass(frozen=True)
class Video:
    """Frames of one video and their times in seconds; each frame becomes an image."""

    frames: Sequence[PILImage.Image]
    times: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.frames) != len(self.times):
            raise UserError(
                f"a video needs one time for every frame, got {len(self.frames)} frames "
                f"and {len(self.times)} times"
            )


Segment = str | Image | Video


@dataclass(frozen=True)
class Turn:
    """What one role says: text, images and videos in order."""

    role: Literal["system", "user", "assistant"]
    content: Sequence[Segment]

    def __post_init__(self) -> None:
        # A string is a sequence of strings too: every character would become a segment.
        if isinstance(self.content, str):
            raise UserError(f"a turn holds a list of segments: write [{self.content!r:.40}]")


@dataclass(frozen=True)
class Prompt:
    """Turns in order. A prompt to be answered ends with a turn of the user."""

    turns: Sequence[Turn]

    @classmethod
    def ask(cls, question: str, images: Sequence[PILImage.Image] = ()) -> "Prompt":
        """A single user turn: the images, then the question."""
        return cls([Turn("user", [*map(Image, images), question])])


def context(sample: Sample) -> list[Segment]:
    """What a sample's questions stand behind: its images, labelled or timed, or else its text."""
    if sample.times is not None:
        return [Video(sample.images, sample.times)]
    if sample.labels is not None:
        pairs = zip(sample.labels, map(Image, sample.images), strict=True)
        return [segment for pair in pairs for segment in pair]
    if not sample.images and sample.text is not None:
        return [sample.text]
    return [Image(image) for image in sample.images]


def _check_images(segments: Iterable[Segment], *, of: str) -> None:
    """Refuse more than ``MAX_IMAGES`` images; every frame of a video is one."""
    images = sum(len(s.frames) if isinstance(s, Video) else isinstance(s, Image) for s in segments)
    if images > MAX_IMAGES:
        raise UserError(
            f"{of} holds {images} images (video frames count), but at most {MAX_IMAGES} may stand "
            "in one prompt: show fewer, or sample fewer frames"
        )


@dataclass
class _Stream:
    """Tokens as they are written, each with what an ``Example`` stores beside it."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # the answer this token spells, or -1
    learn: list[bool] = field(default_factory=list)  # is this token a target?
    tiles: list[np.ndarray] = field(default_factory=list)  # of each image
    tile_starts: list[int] = field(default_factory=list)  # where the span of each tile begins
    position: int = 0
    branch: int = 0

    def write(self, ids: Sequence[int], *, learn: bool = False, answer: int = -1) -> None:
        n = len(ids)
        self.tokens += ids
        self.positions += range(self.position, self.position + n)
        self.branches += [self.branch] * n
        self.answers += [answer] * n
        self.learn += [learn] * n
        self.position += n


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts and samples into examples for one model.

    Attributes:
        tokenizer: text to ids.
        tile_size: S, pixels a side of the encoder's tiles.
        tokens_per_tile: placeholders that a tile takes in the prompt, as the fusion declares.
        max_tiles: most tiles of an image's grid; with more than one, a large image is seen at more
            than one tile's resolution (see ``tiling``), and its global tile comes on top.

    Raises:
        UserError: max_tiles is below 1.
    """

    tokenizer: Tokenizer
    tile_size: int
    tokens_per_tile: int
    max_tiles: int = 1

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise UserError(f"max_tiles is {self.max_tiles}: an image takes at least 1 tile")

    def encode(self, prompt: Prompt, *, loss: Loss = "answer", reply: bool = False) -> Example:
        """Encode a conversation in Llama 4's chat format.

        Args:
            prompt: the turns.
            loss: which tokens are targets: those of assistant turns (``answer``) or all text.
            reply: end with an open assistant header, so that the model may answer.

        Raises:
            UserError: the prompt has no turn or too many images, or an assistant turn is empty or
                not just text.
        """
        if not prompt.turns:
            raise UserError("a prompt needs at least one turn")
        _check_images((s for turn in prompt.turns for s in turn.content), of="the prompt")
        stream, kinds = self._start(), list[str]()
        for turn in prompt.turns:
            if turn.role != "assistant":
                self._say(stream, turn.role, turn.content, learn=loss == "text")
                continue
            said = [segment for segment in turn.content if isinstance(segment, str)]
            if len(said) < len(turn.content):
                raise UserError("an assistant turn holds an image or a video, not just text")
            self._answer(
                stream,
                "".join(said),
                of="an assistant turn",
                answer=len(kinds),
                learn_header=loss == "text",
            )
            kinds.append("answer")
        if reply:
            self._header(stream, "assistant")
        return self._finish(stream, kinds)

    def encode_sample(self, sample: Sample, *, loss: Loss = "answer") -> Example:
        """Encode a sample: its images once, then every question as a branch of its own.

        Each question sees the images and itself only, and its positions start right behind the
        images::

            token     <bos> <header> image image | question 1 answer 1 | question 2 answer 2
            branch      0      0       0     0   |     1         1     |     2         2
            position    0      1       2     3   |     4         5     |     4         5

        The end-of-turn token of a branch is its last target, and no input.

        Raises:
            UserError: the sample has no question or too many images, or an answer is empty.
        """
        if not sample.questions:
            raise UserError(f"sample {sample.content} has no question")
        shown = context(sample)
        _check_images(shown, of=f"sample {sample.content}")
        stream = self._start()
        self._header(stream, "user")
        self._content(stream, shown, learn=False)
        trunk = stream.position
        for number, question in enumerate(sample.questions):
            stream.branch, stream.position = number + 1, trunk
            learn = loss == "text"
            self._content(stream, [question.text], learn=learn)
            stream.write([self.tokenizer.eot], learn=learn)
            of = f"sample {sample.content}: the answer to {question.text!r}"
            self._answer(stream, question.answer, of=of, answer=number, learn_header=learn)
        return self._finish(stream, [q.kind for q in sample.questions])

    def _start(self) -> _Stream:
        stream = _Stream()
        stream.write([self.tokenizer.bos])
        return stream

    def _header(self, stream: _Stream, role: str, *, learn: bool = False) -> None:
        stream.write(self.tokenizer.header(role), learn=learn)

    def _say(self, stream: _Stream, role: str, content: Sequence[Segment], *, learn: bool) -> None:
        self._header(stream, role)
        self._content(stream, content, learn=learn)
        stream.write([self.tokenizer.eot], learn=learn)

    def _answer(
        self, stream: _Stream, text: str, *, of: str, answer: int, learn_header: bool
    ) -> None:
        if not text.strip():
            raise UserError(f"{of} is empty: it needs at least one token")
        self._header(stream, "assistant", learn=learn_header)
        ids = [*self.tokenizer.encode(text), self.tokenizer.eot]
        stream.write(ids, learn=True, answer=answer)

    def _content(self, stream: _Stream, content: Sequence[Segment], *, learn: bool) -> None:
        for segment in content:
            match segment:
                case str():
                    stream.write(self.tokenizer.encode(segment), learn=learn)
                case Image():
                    self._image(stream, segment.pixels)
                case Video():
                    for frame, seconds in zip(segment.frames, segment.times, strict=True):
                        stream.write(self.tokenizer.encode(frame_mark(seconds)), learn=learn)
                        self._image(stream, frame)

    def _image(self, stream: _Stream, image: PILImage.Image) -> None:
        tiles, rows, columns = cut(image, self.tile_size, self.max_tiles)
        stream.tiles.append(tiles)
        stream.tile_starts += [len(stream.tokens)] * len(tiles)
        span = image_span(self.tokens_per_tile, rows, columns)
        stream.write([self.tokenizer.special(name) for name in span])

    def _finish(self, stream: _Stream, kinds: Sequence[str]) -> Example:
        tokens = np.array(stream.tokens, dtype=np.int64)
        branches = np.array(stream.branches, dtype=np.int64)
        targets = np.where(stream.learn, tokens, IGNORE)
        labels = np.full_like(tokens, IGNORE)
        answers = np.full_like(tokens, -1)
        # Place t predicts the token after it, but never across the edge of a branch: what follows
        # the trunk is ambiguous, and what follows a branch belongs to another question.
        same = branches[1:] == branches[:-1]
        labels[:-1] = np.where(same, targets[1:], IGNORE)
        answers[:-1] = np.where(same, np.array(stream.answers)[1:], -1)
        # The last token of a branch predicts nothing, and no other token sees it.
        read = np.append(same, False) | (branches == 0)
        place = np.cumsum(read) - 1  # of the tokens that are read
        no_tiles = np.zeros((0, 3, self.tile_size, self.tile_size), dtype=np.uint8)
        return Example(
            tokens=tokens[read],
            labels=labels[read],
            positions=np.array(stream.positions, dtype=np.int64)[read],
            branches=branches[read],
            answers=answers[read],
            patches=tokens[read] == self.tokenizer.special(PATCH),
            kinds=tuple(kinds),
            tiles=np.concatenate([no_tiles, *stream.tiles]),
            tile_starts=place[np.array(stream.tile_starts, dtype=np.int64)],
        )
