"""MetaCLIP's data curation: which metadata a caption mentions, and a balanced choice of captions.

Xu et al., Demystifying CLIP Data (arXiv 2309.16671), section 3. Where the paper leaves a rule open,
the authors' code decides (facebookresearch/MetaCLIP, metaclip/metaclip1 and metaclip/metadata):

    metadata entries e       "photo", "dog", "golden gate", ...
    matching                 the entries that occur in a caption, as whole words
    count_e                  in how many captions e occurs: a few entries in most of them
    p_e = min(1, t / count_e)
    a caption is kept with probability 1 - Π (1 - p_e) over the entries it matches

So a tail entry (count_e <= t) keeps all of its captions, a head entry keeps about t of them and
those that other entries vouch for, and a caption that matches nothing is dropped.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from ahocorasick_rs import AhoCorasick, MatchKind
from numpy.typing import NDArray

Record = TypeVar("Record")

# The authors' substr_matching.py sets these marks apart from words and takes these for spaces;
# no other character is touched, quotation marks, brackets and hyphens among them.
MARKS = ",.;:?!`"
SPACES = "\t\n\r"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def spacing(text: str) -> str:
    """The text as it is searched: between spaces, with marks set apart from words.

    >>> spacing("A dog, asleep.")
    ' A dog ,  asleep .  '
    """
    for mark in MARKS:
        text = text.replace(mark, f" {mark} ")
    for space in SPACES:
        text = text.replace(space, " ")
    return f" {text} "


class Matcher:
    """Finds the metadata entries that occur in a text.

    An entry occurs where it stands between spaces after ``spacing`` of the text (the authors'
    substr_matching.py): `photo` is in "a photo, framed" but not in "photography". What follows:

    - Case and accents count: `dog` is not in "Dog". Nothing is normalised.
    - The words of an entry stand one space apart, so `new york` is not in "new, york".
    - An entry with one of the marks inside a word (`St. Louis`) never occurs: see ``never``.
    - Other punctuation belongs to the word: `dog` is not in '"dog"' or "dog's".

    Building takes memory and seconds; ``entries`` can be sent to another process, a matcher cannot.

    Raises:
        ValueError: there are no entries, one is empty, or one is there twice.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(entries)
        if not self.entries:
            raise ValueError("the metadata has no entries")
        if any(not entry.strip() for entry in self.entries):
            raise ValueError("the metadata has an empty entry")
        if len(set(self.entries)) < len(self.entries):
            raise ValueError("the metadata has an entry twice")
        # Standard: the one kind that reports matches which overlap, as entries share their spaces.
        self._automaton = AhoCorasick(
            [f" {entry} " for entry in self.entries], MatchKind.Standard, store_patterns=False
        )

    def match(self, text: str) -> list[int]:
        """The positions in ``entries`` of those that occur in the text, each once, ascending."""
        spaced = spacing(text)
        try:
            found = self._automaton.find_matches_as_indexes(spaced, overlapping=True)
        except UnicodeEncodeError:  # half a character, as in captions cut at a length
            spaced = _LONE_SURROGATE.sub("\ufffd", spaced)
            found = self._automaton.find_matches_as_indexes(spaced, overlapping=True)
        return sorted({entry for entry, _, _ in found})

    def count(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """In how many of the texts each entry occurs, [entries]."""
        counts = np.zeros(len(self.entries), np.int64)
        for text in texts:
            counts[self.match(text)] += 1
        return counts

    def never(self) -> list[str]:
        """The entries that cannot occur: ``spacing`` breaks up every text that has them."""
        broken = re.compile(rf"[^ ][{MARKS}]|[{MARKS}][^ ]|[{SPACES}]")
        return [entry for entry in self.entries if broken.search(f" {entry} ")]


def threshold_for_tail(counts: NDArray[np.int64], share: float) -> int:
    """The t at which the tail holds a share of all matches, for corpora of another size.

    The smallest t for which the entries with count <= t hold at least ``share``; those with
    count < t hold less. The paper's t = 20,000 for 400M pairs leaves the tail 6%, and that share
    gives t = 170,000 for the larger pool. The authors' p_to_t (metaclip/curation/curate.py) takes
    the nearest share instead: the same t, or that of the entry before in the order of counts.

    Args:
        counts: of each entry, [entries].
        share: between 0 and 1.

    Raises:
        ValueError: the share is out of range, or nothing was matched.
    """
    if not 0 < share < 1:
        raise ValueError(f"the tail's share must lie between 0 and 1, got {share}")
    ascending = np.sort(counts)
    held = np.cumsum(ascending)
    if not held.size or not held[-1]:
        raise ValueError("no entry was matched, so there is no tail")
    return int(ascending[np.searchsorted(held, share * held[-1])])


def entry_probabilities(counts: NDArray[np.int64], t: int) -> NDArray[np.float64]:
    """p_e = min(1, t / count_e) of each entry, [entries] (Algorithm 1, part 2).

    Raises:
        ValueError: t is less than 1.
    """
    if t < 1:
        raise ValueError(f"the threshold must be at least 1, got {t}")
    return t / np.maximum(counts, t)


def keep_probability(entries: Sequence[int], probabilities: NDArray[np.float64]) -> float:
    """1 - Π (1 - p_e) over the entries that a text matches; 0 if there are none.

    It is the chance that at least one of independent coins, one an entry, shows heads: Algorithm 1
    and the authors' balancing.py toss them one after the other. Their README prints
    min(Σ p_e, 1) for use in a data loader, which is larger as soon as two coins count.
    """
    return 1.0 - float(math.prod(1.0 - probabilities[entry] for entry in entries))


def identity(record: Mapping[str, object], text: str) -> bytes:
    """What tells one pair from another: its ``id``, else its ``url``, and the text.

    Without either, all of the record, whatever the order of its keys. Copies of a pair have one
    identity, so all or none of them are kept; different texts for one image, and records of
    different shards that are numbered alike, have identities of their own. Remove copies first:
    they also weigh in the counts.
    """
    name = next((record[k] for k in ("id", "url") if isinstance(record.get(k), str | int)), None)
    content = json.dumps([name, text] if name is not None else record, sort_keys=True)
    return content.encode()


def draw(seed: int, identity: bytes) -> float:
    """A number from [0, 1), uniform over identities; a function of its arguments alone."""
    digest = hashlib.blake2b(identity, digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # as many bits as a float holds


def balance(
    pairs: Iterable[tuple[Record, str, bytes]],
    matcher: Matcher,
    probabilities: NDArray[np.float64],
    seed: int = 0,
) -> Iterator[tuple[Record, list[int]]]:
    """The pairs to keep, in their order, each with the entries that it matches.

    Whether a pair is kept depends on the seed, its identity and its entries alone: not on its
    shard, its neighbours or the process. At the same counts and seed, a larger t keeps all that a
    smaller one keeps.

    Args:
        pairs: a record of any type, its text, and its ``identity``.
        matcher: that counted the entries.
        probabilities: p_e of each entry, [entries].
        seed: of the choice.
    """
    for record, text, key in pairs:
        entries = matcher.match(text)
        if entries and draw(seed, key) < keep_probability(entries, probabilities):
            yield record, entries


def build_metadata(
    texts: Iterable[str], least_count: int, least_pmi: float = 8.0, limit: int = 2**20
) -> tuple[list[str], int]:
    """Metadata out of the captions themselves: frequent words, and pairs of words that belong.

    As the paper's recipe for Wikipedia (section 3.1, build_metadata.py): words by count, bigrams by
    pointwise mutual information, log2(count(a b) · words / (count(a) · count(b))). Two differences.
    The paper's 30 bits suit Wikipedia's billions of words; PMI is at most log2(words / count), so
    a corpus of captions needs less: 8 bits are a pair 256 times as frequent as chance. And a bigram
    too must occur ``least_count`` times, since PMI favours what occurs once.

    Words are what stands between spaces after ``spacing``, so that every entry can match;
    punctuation ends a bigram.

    Args:
        texts: the captions, read once.
        least_count: of a word or bigram; the paper's is 100 for words.
        least_pmi: of a bigram, in bits.
        limit: at most so many words and as many bigrams are held at a time, about 150 bytes each.

    Returns:
        The entries, sorted, and by how much a count may fall short, because the rarest were
        dropped at the limit: 0 below it, at most 2 · words / ``limit``. Every entry has its count;
        missing may be those that occur less than ``least_count`` plus that number. Above the limit
        the order of the texts matters.

    Raises:
        ValueError: the captions have no word that is frequent enough.
    """
    words, bigrams, total = _Tally(limit), _Tally(limit), 0
    for text in texts:
        before = ""
        for word in spacing(text).split(" "):
            # Between two spaces stands the empty word: it ends a bigram as punctuation does.
            if not any(character.isalnum() for character in word):
                before = ""
                continue
            total += 1
            words.add(word)
            if before:
                bigrams.add(f"{before} {word}")
            before = word

    def pmi(bigram: str, count: int) -> float:
        # Words may have been counted short: at most, then, so that no bigram gains by it.
        one, other = (words.counts.get(word, 0) + words.short for word in bigram.split(" "))
        return math.log2(count * total / (one * other))

    entries = [word for word, count in words.counts.items() if count >= least_count]
    if not entries:
        raise ValueError(f"no word occurs {least_count} times, so there is no metadata to build")
    entries += [
        bigram
        for bigram, count in bigrams.counts.items()
        if count >= least_count and pmi(bigram, count) >= least_pmi
    ]
    return sorted(entries), max(words.short, bigrams.short)


class _Tally:
    """Counts of the frequent keys among any number of keys, in bounded memory.

    Misra and Gries, Finding repeated elements (1982), in batches: beyond ``limit`` keys, the median
    count is taken off every count and what is left without one is forgotten. Each time, at least
    half the keys lose that much, so no count falls short by more than 2 · additions / limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: dict[str, int] = {}
        self.short = 0

    def add(self, key: str) -> None:
        """Count a key once more."""
        self.counts[key] = self.counts.get(key, 0) + 1
        if len(self.counts) > self.limit:
            median = sorted(self.counts.values())[len(self.counts) // 2]
            self.short += median
            self.counts = {k: n - median for k, n in self.counts.items() if n > median}
