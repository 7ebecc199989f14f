"""VQA accuracy: how many of ten people gave the same answer.

Source: Antol et al. 2015 (VQA, section 4) and the script its authors publish, GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py. ``mode="official"`` gives that script's score for
every record, including what looks unintended there:

- Answers are normalised only where the ten are not all the same. Where all ten are "yes", the
  prediction "Yes." scores 0. (The authors' reason: text read off an image should stay as it is.)
- A punctuation mark becomes a space; but if it touches a space anywhere in the answer, or if the
  answer has a comma between two digits, every such mark vanishes: "1,000-ton" is "1000ton".
- A period vanishes wherever no digit follows, after a digit too; only the first 32 in an answer.
- "none" is 0, like "zero"; an answer that is an article is empty.
- Words are lowered first, so the script's contractions with a capital ("Im") never apply, and
  "somebody'd" loses its apostrophe.

``mode="always"`` normalises every record, as lmms-eval and others do.

Digits and white space are those of Unicode, as when Python 3 runs the script. Python 2, for which
it was written, knows ASCII digits alone.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from sandbox.evals.metrics import Scored

Mode = Literal["official", "always"]

VERSION = "1"
MODES: tuple[Mode, ...] = get_args(Mode)

_COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
ARTICLES = {"a", "an", "the"}

_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
"""
# The spellings that the script mends: those that lack one apostrophe.
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
}

_MARK = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the script passes a flag of this value where `re` takes a count


def accuracy(prediction: str, answers: Sequence[str], mode: Mode = "official") -> Scored:
    """The VQA accuracy of one prediction against people's answers, ten of them in all VQA sets.

    Each answer in turn is left out; the prediction scores min(1, matches among the others / 3);
    the mean over all turns counts. With ten answers, 0, 1, 2, 3 and more matches give 0, 0.3, 0.6,
    0.9 and 1.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("the VQA accuracy needs at least one answer")
    prediction, answers = _flat(prediction), [_flat(answer) for answer in answers]
    if mode == "always" or len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    matches = [answer == prediction for answer in answers]
    total = sum(matches)
    # Summed in the script's order, for the same last digit.
    score = sum(min(1, (total - left_out) / 3) for left_out in matches) / len(answers)
    return Scored(score, prediction)


def normalise(answer: str) -> str:
    """An answer in lower case, its punctuation, number words, articles and apostrophes unified.

    >>> normalise("The dog isnt on two-seaters.")
    "dog isn't on 2 seaters"
    """
    if marks := set(_MARK.findall(answer)):
        close_up = _COMMA_IN_NUMBER.search(answer) is not None
        answer = answer.translate(
            {
                ord(mark): "" if close_up or f"{mark} " in answer or f" {mark}" in answer else " "
                for mark in marks
            }
        )
    answer = _PERIOD.sub("", answer, count=_MOST_PERIODS)
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _flat(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
