"""MetaCLIP's curation: matching by whole words, counts, balancing, metadata from captions."""

import math
import random
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from encoders.curation import (
    MARKS,
    Matcher,
    _Tally,
    balance,
    build_metadata,
    draw,
    entry_probabilities,
    identity,
    keep_probability,
    spacing,
    threshold_for_tail,
)

Pairs = list[tuple[str, str, bytes]]


def pairs(texts: Iterable[str]) -> Pairs:
    """Each text as a record with an identity of its own."""
    return [(f"{n}: {text}", text, f"{n}".encode()) for n, text in enumerate(texts)]


def kept(given: Pairs, entries: Sequence[str], t: int, seed: int = 0) -> list[str]:
    """The records that balancing keeps."""
    matcher = Matcher(entries)
    chances = entry_probabilities(matcher.count(text for _, text, _ in given), t)
    return [record for record, _ in balance(given, matcher, chances, seed)]


# --- Matching -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "text", "found"),
    [
        ("photo", "a photo", True),
        ("photo", "photo", True),
        ("photo", "photography", False),
        ("photo", "a stock-photo", False),
        ("photo", "photo, framed", True),
        ("photo", "x.photo!", True),
        ("photo", "a\tphoto\nof", True),
        ("photo", '"photo"', False),
        ("photo", "a (photo)", False),
        ("photo", "the photo's frame", False),
        ("photo", "Photo", False),
        ("Photo", "a Photo", True),
        ("new york", "in new york today", True),
        ("new york", "new\nyork", True),
        ("new york", "new  york", False),
        ("new york", "new, york", False),
        ("new york", "new\r\nyork", False),
        (",", "a,b", True),
        ("a . b", "a.b", True),
        ("St. Louis", "in St. Louis", False),
        ("café", "un café noir", True),
        ("café", "un cafe\u0301 noir", False),
        ("日本", "東京 日本 2024", True),
        ("日本", "日本語", False),
        ("dog", "\u00a0dog\u00a0", False),
        ("dog", "a dog \ud83d", True),
    ],
)
def test_an_entry_is_found_where_the_authors_find_it(entry: str, text: str, found: bool) -> None:
    """`photo` in `photography` would count another concept; the last text ends in half a letter."""
    assert Matcher([entry, "elsewhere"]).match(text) == [0] * found


def test_matches_are_those_of_plain_search() -> None:
    """Entries that share a space, or lie inside each other, hide one another from most matchers."""
    rng = random.Random(0)
    letters = "ab é" + MARKS[:2]
    entries = list({"".join(rng.choices(letters, k=rng.randint(1, 4))).strip() for _ in range(80)})
    entries = [entry for entry in entries if entry]
    matcher = Matcher(entries)
    texts = ["".join(rng.choices(letters + "\n\tc", k=rng.randint(0, 25))) for _ in range(400)]
    expected = [
        [n for n, entry in enumerate(entries) if f" {entry} " in spacing(text)] for text in texts
    ]
    assert [matcher.match(text) for text in texts] == expected
    assert sum(len(found) > 1 for found in expected) > 100
    occurrences = Counter(n for found in expected for n in found)
    assert matcher.count(texts).tolist() == [occurrences[n] for n in range(len(entries))]


def test_entries_that_cannot_occur_are_named() -> None:
    """Metadata full of `St. Louis` and `U.S.` matched nothing, without a word about it."""
    entries = ["St. Louis", "U.S.", "a . b", ".", "dog", "tab\tbed", "rock 'n' roll"]
    matcher = Matcher(entries)
    assert matcher.never() == ["St. Louis", "U.S.", "tab\tbed"]
    for entry, text in (("a . b", "a.b"), (".", "x."), ("rock 'n' roll", "rock 'n' roll")):
        assert Matcher([entry]).match(text) == [0]


@pytest.mark.parametrize(
    ("entries", "what"), [([], "no entries"), (["a", " "], "empty"), (["a", "b", "a"], "twice")]
)
def test_metadata_of_no_use_is_refused(entries: list[str], what: str) -> None:
    """An empty entry occurs in every text with two spaces; a double one halves its own count."""
    with pytest.raises(ValueError, match=what):
        Matcher(entries)


# --- Balancing ------------------------------------------------------------------------------------


def test_the_algorithm_on_paper() -> None:
    """A count of occurrences instead of texts, or p from the wrong side of t, fails here.

        texts                     photo  dog  golden gate
        a photo of a dog            x     x
        photo, photo                x
        a photo                     x
        photo of the golden gate    x               x
        a dog                             x
        a cat
        count                       4     2         1

    With t = 1: p = 1/4, 1/2, 1. Kept with 1 - 3/4 · 1/2 = 5/8, 1/4, 1/4, 1, 1/2 and 0.
    """
    texts = ["a photo of a dog", "photo, photo", "a photo", "photo of the golden gate", "a dog"]
    texts.append("a cat")
    matcher = Matcher(["photo", "dog", "golden gate"])
    counts = matcher.count(texts)
    assert counts.dtype == np.int64
    assert counts.tolist() == [4, 2, 1]
    probabilities = entry_probabilities(counts, 1)
    assert probabilities.tolist() == [0.25, 0.5, 1.0]
    chances = [keep_probability(matcher.match(text), probabilities) for text in texts]
    assert chances == [0.625, 0.25, 0.25, 1.0, 0.5, 0.0]
    # At t = 2 the README's min(Σp, 1) would keep the first text for certain anyway; at t = 1 it
    # would say 0.75.
    assert chances[0] != min(probabilities[[0, 1]].sum(), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_texts_are_kept_as_often_as_the_formula_says(seed: int) -> None:
    """A biased draw, or one coin for all entries, shifts the rate beyond its binomial bounds."""
    rng = random.Random(seed)
    entries = list(string.ascii_lowercase[:8])
    weights = [1 / (n + 1) ** 1.5 for n in range(8)]
    texts = [" ".join(rng.choices(entries, weights, k=rng.randint(0, 3))) for _ in range(300)]
    matcher = Matcher(entries)
    probabilities = entry_probabilities(matcher.count(texts), 20)
    trials = 2000
    for text in texts[:12]:
        found = matcher.match(text)
        chance = keep_probability(found, probabilities)
        assert chance == pytest.approx(1 - math.prod(1 - probabilities[n] for n in found))
        copies: Pairs = [(text, text, f"{text}-{n}".encode()) for n in range(trials)]
        rate = sum(1 for _ in balance(copies, matcher, probabilities, seed)) / trials
        # 5 standard deviations: wrong by chance once in about a million.
        assert abs(rate - chance) <= 5 * math.sqrt(chance * (1 - chance) / trials)


def test_draws_are_uniform_and_independent() -> None:
    """Ids or seeds next to each other whose draws are alike would choose whole runs of texts."""
    draws = np.array([[draw(seed, f"{n}".encode()) for n in range(4000)] for seed in range(3)])
    assert draws.min() >= 0 and draws.max() < 1
    shares = np.histogram(draws, bins=10, range=(0, 1))[0] / draws.size
    assert np.abs(shares - 0.1).max() < 5 * math.sqrt(0.09 / draws.size)
    assert np.abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 5 / math.sqrt(4000)
    assert abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 5 / math.sqrt(4000)


def test_the_head_is_cut_to_t_and_the_tail_stays() -> None:
    """The point of it all; entries that stand alone in their texts, so that t is not exceeded."""
    counts = {"head": 6000, "torso": 1500, "at": 300, "tail": 40}
    texts = [entry for entry, count in counts.items() for _ in range(count)]
    after = Counter(record.split()[1] for record in kept(pairs(texts), list(counts), t=300))
    assert after["at"] == 300 and after["tail"] == 40
    for entry in ("head", "torso"):
        spread = math.sqrt(300 * (1 - 300 / counts[entry]))
        assert abs(after[entry] - 300) < 5 * spread


def test_the_choice_depends_on_nothing_but_seed_and_content() -> None:
    """A running generator gives another data set for each number of shards and each order."""
    rng = random.Random(5)
    given = pairs("cat" if rng.random() < 0.9 else "cat dog" for _ in range(600))
    entries = ["cat", "dog"]
    whole = kept(given, entries, t=100)
    matcher = Matcher(entries)
    chances = entry_probabilities(matcher.count(text for _, text, _ in given), 100)
    shuffled = rng.sample(given, len(given))
    parts = [shuffled[n : n + 70] for n in range(0, len(given), 70)]
    pieces = [record for part in parts for record, _ in balance(part, matcher, chances)]
    assert sorted(pieces) == sorted(whole)
    assert whole != kept(given, entries, t=100, seed=1)
    assert set(whole) < set(kept(given, entries, t=200))


def test_the_identity_of_a_pair() -> None:
    """Ids that start anew in each shard, or many texts of one image, must not share a draw."""

    def of(record: dict[str, object]) -> bytes:
        return identity(record, str(record["text"]))

    assert of({"id": 1, "url": "u", "text": "a"}) == of({"id": 1, "text": "a", "score": 0.5})
    assert of({"url": "u", "text": "a", "score": 0.5}) == of({"url": "u", "text": "a"})
    assert of({"id": None, "url": "u", "text": "a"}) == of({"url": "u", "text": "a"})
    assert of({"image": "x", "text": "a"}) == of({"text": "a", "image": "x"})
    distinct: list[dict[str, object]] = [
        {"id": 1, "text": "a"},
        {"id": 2, "text": "a"},
        {"id": 1, "text": "b"},
        {"url": "u", "text": "a"},
        {"url": "v", "text": "a"},
        {"image": "x", "text": "a"},
        {"image": "y", "text": "a"},
        {"id": 1, "text": "\ud83d"},
    ]
    assert len({of(record) for record in distinct}) == len(distinct)


@pytest.mark.parametrize("share", [0.06, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_tail_holds_its_share(share: float, seed: int) -> None:
    """Off by one entry, a heavy head entry falls into the tail and nothing is balanced."""
    counts = np.random.default_rng(seed).zipf(1.4, 500).astype(np.int64)
    counts[:50] = 0
    t = threshold_for_tail(counts, share)
    assert t >= 1
    assert counts[counts < t].sum() < share * counts.sum() <= counts[counts <= t].sum()


def test_thresholds_out_of_range_are_refused() -> None:
    """t = 0 would keep nothing, and divide by zero for entries that do not occur."""
    with pytest.raises(ValueError, match="at least 1, got 0"):
        entry_probabilities(np.array([1, 2]), 0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            threshold_for_tail(np.array([1, 2]), share)
    with pytest.raises(ValueError, match="no entry was matched"):
        threshold_for_tail(np.zeros(3, np.int64), 0.5)


# --- Metadata from captions -----------------------------------------------------------------------


def test_metadata_from_captions_on_paper() -> None:
    """Bigrams across a comma, or PMI over bigrams instead of words, fail here.

    32 words: `new` 4, `york` 4, `the` 24; `new york` 4 times, `the new` twice, `the the` 19 times,
    and `york the` only across punctuation.
    PMI: log2(4·32/16) = 3; log2(2·32/96) = -0.6; log2(19·32/576) = 0.08.
    """
    the = ("the " * 10).strip()
    texts = [f"the new york, {the}.", "the new york", "new york;", f"new york! {the}\tthe"]
    texts.append("the (-)")
    assert build_metadata(texts, 2, least_pmi=2.9) == (["new", "new york", "the", "york"], 0)
    assert build_metadata(texts, 2, least_pmi=3.1) == (["new", "the", "york"], 0)
    assert build_metadata(texts, 2, least_pmi=0)[0] == ["new", "new york", "the", "the the", "york"]
    assert build_metadata(texts, 5)[0] == ["the"]
    with pytest.raises(ValueError, match="no word occurs 25 times"):
        build_metadata(texts, 25)


def test_built_entries_can_all_match() -> None:
    """Entries cut out by other rules than matching's would stay at zero."""
    rng = random.Random(1)
    alphabet = "abc ,.'-\té日"
    texts = ["".join(rng.choices(alphabet, k=40)) for _ in range(300)]
    entries, _ = build_metadata(texts, 3, least_pmi=-20)
    assert any(" " in entry for entry in entries)
    assert Matcher(entries).never() == []
    assert Matcher(entries).count(texts).min() >= 1


def test_tallies_are_bounded_and_their_error_known() -> None:
    """Counting every distinct word of a web crawl exhausts the memory; dropping some must show."""
    rng = random.Random(2)
    common = [f"w{n}" for n in range(20)]
    words = [rng.choice([*common, f"r{rng.getrandbits(60)}"]) for _ in range(20000)]
    tally, most = _Tally(200), 0
    for word in words:
        tally.add(word)
        most = max(most, len(tally.counts))
    assert most <= 200
    assert 0 < tally.short <= 2 * len(words) / 200
    true = Counter(words)
    assert all(true[w] - tally.short <= tally.counts.get(w, 0) <= true[w] for w in true)
    texts = [" ".join(words[n : n + 8]) for n in range(0, len(words), 8)]
    entries, short = build_metadata(texts, 500, limit=200)
    assert short > 0 and set(entries) == set(common)
