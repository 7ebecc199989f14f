"""What a question accepts, how it is put, and what a reply to it is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from sandbox.data.task import Question
from sandbox.errors import UserError
from sandbox.evals import extraction
from sandbox.evals.metrics import exact_match
from sandbox.evals.score import METRICS, VQA_ANSWERS, Metric

LETTERED = ("exact", "choice")  # metrics under which a question with choices asks for a letter


@dataclass(frozen=True)
class Judge:
    """A metric and how it is applied.

    Attributes:
        metric: a name in ``score.METRICS``.
        mode: one of the metric's modes; None = its first, if it has any.
        extract: score the answer found in a reply, instead of the reply. Multiple choice always
            needs its letter found.

    Raises:
        UserError: there is no such metric or mode.
    """

    metric: str = "exact"
    mode: str | None = None
    extract: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"unknown metric {self.metric!r}: choose one of {', '.join(METRICS)}")
        modes = self.about.modes
        if self.mode is None and modes:
            object.__setattr__(self, "mode", modes[0])
        if self.mode is not None and self.mode not in modes:
            valid = f"one of {', '.join(modes)}" if modes else "none, it has no modes"
            raise UserError(f"metric {self.metric} has no mode {self.mode!r}: choose {valid}")

    @property
    def about(self) -> Metric:
        """Version and modes of the metric."""
        return METRICS[self.metric]

    def text(self, question: Question) -> str:
        r"""The question as it is put: the options of multiple choice follow it, a line each.

        >>> Judge().text(Question("Which?", "red", "", choices=("red", "blue")))
        'Which?\nA. red\nB. blue'
        """
        options = question.choices if self.lettered(question) else ()
        lines = (
            f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)
        )
        return "\n".join([question.text, *lines])

    def targets(self, question: Question) -> tuple[str, ...]:
        """All that is right: letters in multiple choice; empty where the answers are kept back.

        Raises:
            UserError: what is right is no option of the question, or there are not as many answers
                as the metric needs.
        """
        answers = question.answers or ((question.answer,) if question.answer else ())
        if answers and self.metric == "vqa" and len(answers) != VQA_ANSWERS:
            raise UserError(
                f"question {question.id or question.text!r}: VQA accuracy needs {VQA_ANSWERS} "
                f"answers, got {len(answers)}; the metric 'exact' is for single answers"
            )
        if not self.lettered(question):
            return answers
        letters = [letter for answer in answers if (letter := _option(answer, question.choices))]
        if answers and not letters:
            raise UserError(
                f"question {question.id or question.text!r}: the answer {answers[0]!r:.80} is none "
                f"of the choices {', '.join(question.choices) or extraction.LETTERS}"
            )
        return tuple(dict.fromkeys(letters))

    def found(self, question: Question, reply: str) -> str | None:
        """The answer in a reply, by default all of it; None if none is found, and never a guess."""
        if self.lettered(question):
            letters = _letters(question.choices)
            return extraction.choice(reply, letters) or _named(reply, question.choices)
        return extraction.extract(reply) if self.extract else reply

    def score(self, answer: str | None, targets: Sequence[str], mode: str | None = None) -> float:
        """From 0 to 1: an answer in a mode, by default the judge's own; 0 where none was found."""
        if answer is None:
            return 0.0
        mode = mode or self.mode
        options = {"mode": mode} if mode else {}
        return self.about.score(answer, targets, **options).score

    def lettered(self, question: Question) -> bool:
        """Whether the answer is a letter, which has to be found in a reply."""
        chooses = bool(question.choices) and self.metric in LETTERED
        return chooses or self.metric == "choice"


def _letters(choices: Sequence[str]) -> str:
    return ascii_uppercase[: len(choices)] or extraction.LETTERS


def _named(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that a text spells out."""
    lettered = zip(ascii_uppercase, choices, strict=False)
    letters = [letter for letter, choice in lettered if exact_match(text, choice)]
    return letters[0] if len(letters) == 1 else None


def _option(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of an answer that is an option, or a letter itself."""
    letter = answer.strip().upper()
    own = letter if len(letter) == 1 and letter in _letters(choices) else None
    return _named(answer, choices) or own
