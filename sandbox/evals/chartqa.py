"""ChartQA's relaxed accuracy: numbers may be 5% off, everything else has to be equal.

Source: Methani et al. 2020 (PlotQA) and Masry et al. 2022 (ChartQA, section 5.1). The authors
publish no script for it. ``mode="reference"`` is what the field computes instead, for every record:
``relaxed_correctness`` in google-research/pix2struct, pix2struct/metrics.py, on the prediction
without the white space around it (lmms-eval has the same rule). Its quirks:

- Years are numbers: 2008 is right where 2010 is meant.
- "5%" is 0.05, and therefore wrong where the chart's label is 5.
- Thousands separators, currency signs and a full stop after a word make a text; so does a zero
  target: "0.0" is wrong where "0" is meant.
- What Python's ``float`` reads is a number: "1_000", "1e3", "nan".

``mode="robust"`` is ours and compares what was meant; published scores are not robust ones:

- Thousands separators and one sign of a currency are dropped, as are quotation marks around an
  answer and full stops after it. Scale words ("5 million") stay text.
- A percentage equals both its number and its hundredth: "5%" is right for 5 and for 0.05.
- Where the target is a year, a whole number of four digits from 1800 to 2099, only the same number
  is right. (So is, alas, a count that looks like a year.)
- Where the target is 0, only 0 is right.
- A target in brackets is a list: as many items, each of them right, in the same order; the
  prediction may lack the brackets.
- 5% are exactly 5%: 1.05 is right for 1, which binary fractions deny.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, NamedTuple, get_args

from sandbox.evals.metrics import Scored

Mode = Literal["reference", "robust"]

VERSION = "1"
MODES: tuple[Mode, ...] = get_args(Mode)

TOLERANCE = 0.05

_YEAR = re.compile(r"(18|19|20)[0-9]{2}")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?[$€£¥₹]? ?(?=\.?[0-9])"
    r"(?P<number>([0-9]{1,3}(,[0-9]{3})+|[0-9]*)(\.[0-9]*)?(e[-+]?[0-9]{1,2})?)"
    r" ?[$€£¥₹]?(?P<percent>%?)"
)
_LONGEST_NUMBER = 64  # letters: beyond it, a text


class _Number(NamedTuple):
    value: Decimal
    percent: bool


def relaxed_accuracy(prediction: str, answers: Sequence[str], mode: Mode = "reference") -> Scored:
    """1 if a prediction matches any of the accepted answers, else 0; ChartQA has one answer each.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("the relaxed accuracy needs at least one answer")
    if mode == "robust":
        plain = _plain(prediction)
        return Scored(float(any(_means(plain, _plain(answer)) for answer in answers)), plain)
    stripped = prediction.strip()
    return Scored(float(any(_equals(stripped, answer) for answer in answers)), stripped.lower())


def _equals(prediction: str, target: str) -> bool:
    """Whether a prediction is right in reference mode."""
    number, wanted = _float(prediction), _float(target)
    if number is None or not wanted:  # not a number, or zero
        return prediction.lower() == target.lower()
    return abs(number - wanted) / abs(wanted) <= TOLERANCE


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    """A text in lower case with single spaces, ASCII minus, and without what surrounds it."""
    text = " ".join(text.casefold().replace("−", "-").split())
    return text.lstrip("\"' ").rstrip("\"' .")


def _means(prediction: str, target: str) -> bool:
    """Whether a prediction is right in robust mode; both are plain."""
    if target.startswith("[") and target.endswith("]"):
        items, wanted = _items(prediction), _items(target)
        return len(items) == len(wanted) and all(map(_means_item, items, wanted))
    return _means_item(prediction, target)


def _means_item(prediction: str, target: str) -> bool:
    number, wanted = _parse(prediction), _parse(target)
    if number is None or wanted is None:
        return prediction == target
    if _YEAR.fullmatch(target):
        return number.value == wanted.value and not number.percent
    readings = [number.value]
    if number.percent and not wanted.percent:
        readings.append(number.value / 100)
    if wanted.percent and not number.percent:
        readings.append(number.value * 100)
    room = abs(wanted.value) * Decimal(str(TOLERANCE))
    return any(abs(reading - wanted.value) <= room for reading in readings)


def _items(text: str) -> list[str]:
    """The items of a list: commas with a space separate them where there are any."""
    inner = text.removeprefix("[").removesuffix("]")
    return [_plain(item) for item in inner.split(", " if ", " in inner else ",")]


def _parse(text: str) -> _Number | None:
    """The number that a plain text is, if it is one."""
    found = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if not found:
        return None
    value = Decimal(found["sign"] + found["number"].replace(",", ""))
    return _Number(value, percent=bool(found["percent"]))
