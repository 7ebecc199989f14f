"""ANLS, the average normalised Levenshtein similarity of DocVQA and its relatives.

Source: Biten et al. 2019 (Scene Text Visual Question Answering, equation 1) and the evaluation
script of the Robust Reading Competition, which serves DocVQA and InfographicVQA. ``anls`` gives the
script's score for every record, where it deviates from the equation too:

- The distance is taken between texts in lower case with single spaces, but divided by the length of
  the longer *raw* text (in capitals: "ß" counts twice). Surplus spaces raise the score of a wrong
  letter.
- A similarity of exactly 0.5 is kept; the equation gives 0 there.
- An empty prediction for an empty answer scores 1.
"""

from collections.abc import Sequence

from sandbox.evals.metrics import Scored

VERSION = "1"

THRESHOLD = 0.5  # a lower similarity is a wrong answer, no misread one


def anls(prediction: str, answers: Sequence[str]) -> Scored:
    """The similarity to the closest of the accepted answers; 0 where it is below a half.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("ANLS needs at least one answer")
    plain = _plain(prediction)
    closest = max(_similarity(prediction, plain, answer) for answer in set(answers))
    return Scored(closest if closest >= THRESHOLD else 0.0, plain)


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions that turn one text into the other.

    The dynamic programme of Wagner and Fischer (1974), a row at a time: O(len(a) len(b)).
    """
    above = list(range(len(b) + 1))
    for row, letter in enumerate(a, start=1):
        here = [row]
        for column, other in enumerate(b):
            if letter == other:
                here.append(above[column])
            else:
                here.append(1 + min(above[column], above[column + 1], here[column]))
        above = here
    return above[-1]


def _similarity(prediction: str, plain: str, answer: str) -> float:
    """One answer's similarity, or a value below the threshold where that is certain early."""
    other = _plain(answer)
    if plain == other:
        return 1.0
    length = max(len(prediction.upper()), len(answer.upper()))
    # At least so many letters must be added: no need to compare a page with a word.
    at_best = 1 - abs(len(plain) - len(other)) / length
    return at_best if at_best < THRESHOLD else 1 - levenshtein(plain, other) / length


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
