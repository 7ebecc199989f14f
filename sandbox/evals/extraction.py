r"""The answer in a reply, for models that answer in sentences.

Extraction is a step of its own, before any metric and never part of one: it has its own version,
and how often it fails is reported beside the score. A reply without a recognisable answer is wrong,
never guessed.
"""

import re

VERSION = "1"

LETTERS = "ABCD"
SHORT = 5  # words: a reply of so many is the answer itself

_MARKED = re.compile(r"\\boxed\{([^{}]*)\}|<answer>([^<]*)</answer>")
_STATED = re.compile(r"\banswer(?: to [^.:=\n]{,80}?)?[*\s]*(?:\bis\b|:|=)[:*\s]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<![A-Za-z]\.[A-Za-z])[.!?](?=\s|$)")  # not that of "U.S."
_AROUND = " \t\n*`\"'"
_BRACKETS = "()[]{}$"

_OPTION = re.compile(r"(?:option|choice)\s+", re.IGNORECASE)
# A letter as an answer, "(b)" or "B"; in "A cat" the A is a word, in "D'Arcy" and "B-52" a part.
_LETTER = r"(?:[(\[](?P<bracketed>[A-Za-z])[)\]]|(?P<capital>[A-Z])(?!['’-]?\w))"
_NAMED = re.compile(rf"[*\"'`$]*{_LETTER}(?!(?<=[AI])[ \t]+(?!because\b|since\b|as\b)\w)")
_ANOTHER = re.compile(rf"[*\"'`$)\].]*\s*(?:or|and|/|,|&)\s*(?:option\s+)?[*\"'`$]*{_LETTER}")
_LABEL = re.compile(
    r"(?<![\w(\[.])(?:[(\[](?P<bracketed>[A-Za-z])[)\]]|(?P<capital>[A-Z])[.):])(?=[\s*]|$)"
)


def extract(reply: str) -> str | None:
    r"""The final answer in a reply; None if it cannot be told.

    In this order:

    1. what ``\boxed{...}`` or ``<answer>...</answer>`` holds;
    2. what follows "answer is", "answer:" or "answer =", up to the end of the sentence or line (so
       "the answer is Mr. Smith" is cut short);
    3. a whole reply of one line and at most ``SHORT`` words.

    Of several marked or stated answers the last counts. Quotation marks and asterisks around it and
    the full stop after it are dropped.

    >>> extract("The bar is twice as high. So the answer is **4.5**.")
    '4.5'
    >>> extract("The bar shows that there are four units.") is None
    True
    """
    if _MARKED.search(reply):
        return _marked(reply)
    if stated := list(_STATED.finditer(reply)):
        return _sentence(reply[stated[-1].end() :])
    if "\n" in reply.strip() or len(reply.split()) > SHORT:
        return None
    return _sentence(reply)


def choice(reply: str, letters: str = LETTERS) -> str | None:
    r"""The letter that a reply to a multiple-choice question chooses, in upper case, or None.

    In this order:

    1. a marked answer (see ``extract``) or a whole reply that is one letter, in any case, with or
       without "option" or "choice" before it: "b", "(B)", "**B**.", "Option B";
    2. a capital, or a letter in brackets, where the reply states its answer: "the answer is B",
       "Answer: (b) the red car". The last statement counts, and none that names two letters;
    3. a label at the start: "B. red", "B) red", "(b) red", "B: red"; not if another label follows.

    An "A" (or "I") before a further word is an article ("The answer is A cat"), unless a reason
    follows ("A because").

    >>> choice("It is not the car, so the answer is (B)."), choice("Either A or B")
    ('B', None)
    """
    letters = letters.upper()
    bare = (_marked(reply) or reply).strip(_AROUND + _BRACKETS + ".,:;!")
    bare = _OPTION.sub("", bare, count=1).strip(_AROUND + _BRACKETS).upper()
    if len(bare) == 1:
        return bare if bare in letters else None
    if stated := list(_STATED.finditer(reply)):
        return _named(reply[stated[-1].end() :], letters)
    labels = [label for label in _LABEL.finditer(reply) if _of(label) in letters]
    at_start = labels and not reply[: labels[0].start()].strip(" \t\n*")
    return _of(labels[0]) if at_start and len({*map(_of, labels)}) == 1 else None


def _marked(reply: str) -> str | None:
    found = [boxed or tagged for boxed, tagged in _MARKED.findall(reply)]
    return (found[-1].strip() or None) if found else None


def _sentence(text: str) -> str | None:
    """The first sentence of the first line, without what surrounds it; None if nothing is left."""
    line = text.strip().partition("\n")[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip(_AROUND) or None


def _named(text: str, letters: str) -> str | None:
    """The one letter that a text begins with, as an answer."""
    text = text[option.end() :] if (option := _OPTION.match(text)) else text
    found = _NAMED.match(text)
    if not found or _of(found) not in letters:
        return None
    another = _ANOTHER.match(text, found.end())
    return None if another and _of(another) in letters else _of(found)


def _of(found: re.Match[str]) -> str:
    return (found["bracketed"] or found["capital"]).upper()
