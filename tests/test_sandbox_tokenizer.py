"""The tokenizer: Meta's ids, tiktoken's tokens, text that cannot inject special tokens."""

import base64
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiktoken
import tokenizers
from tiktoken_ext import openai_public

from fusion.layout import IMAGE, IMAGE_END, IMAGE_START, PATCH, TILE_X, TILE_Y
from sandbox.errors import UserError
from sandbox.tokenizer import SMALL_SPECIALS, Tokenizer, llama4_specials
from sandbox.vocabulary.train import generated_texts, main

ROOT = Path(__file__).parents[1]

STRINGS = [
    "",
    " ",
    "What is the value of the red bar?",
    "HTTPServer parses camelCase, snake_case and SCREAMING_CASE; don't, WE'LL, I'd",
    "0 7 12 345 6789 1234567890 3.14159 1,000,000 50% 2003-2004 ٣٤٥ ²½Ⅷ",
    "def f(x):\n    return [x**2 for _ in range(10)]  # no\n\n\tif x != y:\r\n\r\n        pass\n",
    "naïve façade — Straße, ΑΒΓ αβγ, Привет мир, 漢字かな交じり文, हिन्दी में, العربية, עִברִית, ไทย",
    "e\u0301 \u200b\u00a0\u2028\u0085\ufeff ǅ ʰ \u017f '\u017f \u212a'S",
    "😀👩‍👩‍👧 🇩🇪\U0010ffff\x00\x7f",
    "   leading, trailing   \n  \n \t \n",
    "aaaaaaaaaaaaaaaaaaaaaaa -------==== ......///\n/// <|eot|><|patch|>",
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Text of many kinds: code of the standard library, and the strings above."""
    modules = ("argparse.py", "ast.py", "difflib.py", "statistics.py", "textwrap.py")
    library = Path(subprocess.__file__).parent
    return [*STRINGS * 20, *((library / name).read_text(encoding="utf-8") for name in modules)]


def ranks_of(tokenizer: Tokenizer, specials: int) -> dict[bytes, int]:
    """The base vocabulary as tiktoken wants it, through tiktoken's own table of byte letters."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = [chr(i) for i in range(256) if chr(i) in letters]
    others = [i for i in range(256) if chr(i) not in letters]
    table = {c: ord(c) for c in printable} | {chr(256 + n): i for n, i in enumerate(others)}
    vocabulary = tokenizer._backend.get_vocab(with_added_tokens=False)
    assert len(vocabulary) == tokenizer.vocab_size - specials
    return {bytes(table[c] for c in token): rank for token, rank in vocabulary.items()}


@pytest.fixture(scope="module")
def ranks(corpus: list[str]) -> dict[bytes, int]:
    return ranks_of(Tokenizer.train(corpus, 3000 + len(SMALL_SPECIALS)), len(SMALL_SPECIALS))


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> Path:
    return write_ranks(tmp_path_factory.mktemp("meta") / "tokenizer.model", ranks)


def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """tiktoken itself with these ranks, and with its own copy of the o200k pattern."""
    specials = {name: len(ranks) + i for i, name in enumerate(llama4_specials())}
    with mock.patch("tiktoken_ext.openai_public.load_tiktoken_bpe", return_value=ranks):
        pattern = openai_public.o200k_base()["pat_str"]
    return tiktoken.Encoding(
        "test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("<|begin_of_text|>", 200000),
        ("<|end_of_text|>", 200001),
        ("<|fim_suffix|>", 200004),
        ("<|header_start|>", 200005),
        ("<|header_end|>", 200006),
        ("<|eom|>", 200007),
        ("<|eot|>", 200008),
        ("<|step|>", 200009),
        ("<|python_start|>", 200016),
        ("<|python_end|>", 200017),
        ("<|finetune_right_pad|>", 200018),
        ("<|text_post_train_reserved_special_token_68|>", 200079),
        (IMAGE_START, 200080),
        (IMAGE_END, 200081),
        (TILE_X, 200084),
        (TILE_Y, 200085),
        (IMAGE, 200090),
        ("<|vision_reserved_special_token_6|>", 200091),
        (PATCH, 200092),
        ("<|vision_reserved_special_token_7|>", 200093),
        ("<|vision_reserved_special_token_1047|>", 201133),
        ("<|reasoning_thinking_start|>", 201142),
        ("<|reasoning_thinking_end|>", 201143),
        ("<|reserved_special_token_0|>", 201144),
        ("<|reserved_special_token_903|>", 202047),
    ],
)
def test_special_ids_are_meta_ids(name: str, wanted: int) -> None:
    """Guards against a reserved token too many or too few, which shifts every id behind it."""
    assert 200_000 + llama4_specials().index(name) == wanted


def test_special_tokens_are_distinct_and_fill_meta_vocabulary() -> None:
    """Guards against an embedding of the wrong height: Meta's has 202 048 rows."""
    names = llama4_specials()
    assert len(names) == len(set(names)) == 2048
    assert [name for name in names if name in SMALL_SPECIALS] == list(SMALL_SPECIALS)


def test_tiktoken_file_gives_tiktoken_ids(
    model_file: Path, ranks: dict[bytes, int], corpus: list[str]
) -> None:
    """Guards against merges in another order, another split of words, and wrong byte letters."""
    ours, theirs = Tokenizer.load(model_file), reference(ranks)
    assert ours.vocab_size == theirs.n_vocab == 3000 + 2048
    for text in corpus:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, disallowed_special=()), text[:60]
        assert ours.decode(ids) == text


@pytest.mark.parametrize("alphabet", ["ab", " \n\ta", "1a'sT", "é漢😀 -", "=-_/\r\n"])
def test_tiktoken_ids_on_random_text(
    model_file: Path, ranks: dict[bytes, int], alphabet: str
) -> None:
    """Guards against differences that only odd text shows: runs, white space, contractions."""
    ours, theirs, rng = Tokenizer.load(model_file), reference(ranks), random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        assert ours.encode(text) == theirs.encode_ordinary(text), repr(text)


def test_tiktoken_ids_where_a_token_has_several_splits(tmp_path: Path) -> None:
    """Guards against keeping one merge a token: tiktoken joins any two halves of a token."""
    rng = random.Random(0)
    for _ in range(8):
        words = {"".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(12)}
        ranks = {bytes([byte]): byte for byte in range(256)}
        ranks |= {word.encode(): 256 + i for i, word in enumerate(sorted(words))}
        ours = Tokenizer.load(write_ranks(tmp_path / "tokenizer.model", ranks))
        theirs = reference(ranks)
        for _ in range(50):
            text = "".join(rng.choices("ab", k=rng.randint(1, 30)))
            assert ours.encode(text) == theirs.encode_ordinary(text), text


def test_special_names_in_text_are_plain_text(small: Tokenizer, model_file: Path) -> None:
    """Guards against a user who ends the turn or fakes an image by typing a special token."""
    for tokenizer in (
        small,
        Tokenizer.load(model_file),
        Tokenizer.from_json(small.to_json()),
        pickle.loads(pickle.dumps(small)),
    ):
        for name in SMALL_SPECIALS:
            ids = tokenizer.encode(f"a{name}b")
            assert max(ids) < tokenizer.bos
            assert tokenizer.decode(ids) == f"a{name}b"


def test_decode_shows_or_skips_special_tokens(small: Tokenizer) -> None:
    """Guards against answers that end in "<|eot|>" and so match nothing."""
    ids = [*small.encode(" red bar"), small.eot]
    assert small.decode(ids) == " red bar"
    assert small.decode(ids, skip_special=False) == " red bar<|eot|>"


def test_header_is_llama4_layout(small: Tokenizer, model_file: Path) -> None:
    """Guards against a chat format that Meta's checkpoints have never seen."""
    for tokenizer in (small, Tokenizer.load(model_file)):
        ids = tokenizer.header("assistant")
        text = tokenizer.decode(ids, skip_special=False)
        assert text == "<|header_start|>assistant<|header_end|>\n\n"
        assert ids[0] == tokenizer.special("<|header_start|>")
        assert tokenizer.header("assistant") is not ids  # the caller may change its list
        assert tokenizer.header("assistant") == ids
    assert len(small.header("user")) == len(small.header("assistant")) == 4


def test_stop_ids(small: Tokenizer) -> None:
    """Guards against generation that runs past an end token Meta's models may also emit."""
    names = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
    assert small.stop_ids == tuple(small.special(name) for name in names)
    assert small.eot in small.stop_ids
    assert small.bos not in small.stop_ids


def test_unknown_special_token_names_the_nearest(small: Tokenizer) -> None:
    """Guards against an error that leaves the user guessing how the token is spelled."""
    with pytest.raises(UserError, match=r"no special token '<\|pach\|>'.*<\|patch\|>"):
        small.special("<|pach|>")
    with pytest.raises(UserError, match="no special token 'red'"):
        small.special("red")


def test_small_vocabulary(small: Tokenizer) -> None:
    """Guards against a vocabulary that costs tokens where tiny models spend theirs, or time."""
    assert small.vocab_size % 64 == 0
    assert small.vocab_size <= 1024
    assert [name for name in SMALL_SPECIALS if small.special(name) < small.bos] == []
    words = ["yes", "no", "red", "circle", "left", "value", "highest", "many", "what", "not"]
    for word in [*map(str, range(101)), *words, *(" " + word for word in words)]:
        assert len(small.encode(word)) == 1, word


def test_generated_tasks_are_in_the_shipped_vocabulary(small: Tokenizer) -> None:
    """Guards against a task whose words the vocabulary lacks: each then costs several tokens."""
    words = set(re.findall(r"[A-Za-z]+", " ".join(generated_texts(samples=10))))
    split = sorted(word for word in words if len(small.encode(" " + word)) > 1)
    assert not split, "retrain it: python -m sandbox.vocabulary.train sandbox/vocabulary/small.json"


def test_training_command_writes_a_vocabulary_like_the_shipped_one(
    small: Tokenizer, tmp_path: Path
) -> None:
    """Guards against a command in the docs that no longer works or yields another size."""
    out = tmp_path / "small.json"
    main([str(out)])
    assert Tokenizer.load(out).vocab_size == small.vocab_size
    assert [Tokenizer.load(out).special(name) for name in SMALL_SPECIALS] == [
        small.special(name) for name in SMALL_SPECIALS
    ]


@pytest.mark.parametrize("text", STRINGS)
def test_any_text_round_trips(small: Tokenizer, text: str) -> None:
    """Guards against bytes without a token, and against normalisation or stripped spaces."""
    assert small.decode(small.encode(text)) == text


def test_json_and_pickle_keep_everything(small: Tokenizer, model_file: Path) -> None:
    """Guards against a checkpoint, or a data worker, that tokenises otherwise than the run did."""
    for tokenizer in (small, Tokenizer.load(model_file)):
        for copy in (
            Tokenizer.from_json(tokenizer.to_json()),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert copy.fingerprint == tokenizer.fingerprint
            assert copy.to_json() == tokenizer.to_json()
            assert all(copy.encode(text) == tokenizer.encode(text) for text in STRINGS)


def test_fingerprint_tells_vocabularies_apart(
    small: Tokenizer, model_file: Path, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    """Guards against two vocabularies of one size that pass for the same."""
    last, before = list(ranks)[-1], list(ranks)[-2]
    swapped = ranks | {last: ranks[before], before: ranks[last]}
    other = Tokenizer.load(write_ranks(tmp_path / "swapped.model", swapped))
    prints = {t.fingerprint for t in (small, Tokenizer.load(model_file), other)}
    assert len(prints) == 3
    assert all(len(p) == 12 for p in prints)


def test_training_twice_gives_the_same_bytes() -> None:
    """Guards against an order left to hashes or threads: the shipped file must be rebuildable."""
    code = (
        "import sys; from sandbox.tokenizer import Tokenizer;"
        "words = sys.argv[1].split();"
        "print(Tokenizer.train(words * 3, 320).to_json())"
    )
    text = " ".join(STRINGS[2:6]) + " and a few more words so that there are pairs enough to merge"
    command = [sys.executable, "-c", code, text.replace("\x00", "")]
    runs = [
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout for _ in range(2)
    ]
    assert runs[0] == runs[1] != b""


def test_training_refuses_more_tokens_than_the_text_yields() -> None:
    """Guards against a vocabulary smaller than the configured embedding."""
    with pytest.raises(ValueError, match="yield 269 tokens, not 512"):
        Tokenizer.train(["ab"], 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file.*'small'"),
        (b"not a tokenizer", "line 1: expected a base64 token and its rank"),
        (b"IQ== 0\nIg== one\n", "line 2: expected a base64 token"),
        (b"IQ== 0\nIg==", "line 2: expected a base64 token"),
        (b"IQ== 0\nIg== 2\n", "ranks do not count"),
        (b"IQ== 0\nIg== 0\n", "ranks do not count"),
        (b"IQ== 0\nIg== 1\n", "254 of the 256 bytes"),
        (b"", "256 of the 256 bytes"),
        (b"{}", "not the JSON of a tokenizer"),
        (b'{"model": ', "not the JSON of a tokenizer"),
        (b"{\xff", "can't decode byte 0xff"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    """Guards against a traceback, or silently other ids, out of a half-downloaded file."""
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    """Guards against a vocabulary without Llama 4's special tokens, found out mid-training."""
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    path = tmp_path / "tokenizer.json"
    foreign.save(str(path))
    with pytest.raises(UserError, match=r"no special token '<\|begin_of_text\|>'"):
        Tokenizer.load(path)
