"""Byte-level BPE with Llama 4's special tokens and chat headers.

The shipped vocabulary (``small``) suits tiny models; Meta's ``tokenizer.model`` gives Meta's ids.
Facts (pattern, special tokens, their order) were read off ``models/llama4/tokenizer.py`` in Meta's
llama-models repository.
"""

import base64
import binascii
import difflib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sandbox.errors import UserError

# The pre-tokenisation of OpenAI's o200k vocabulary, which Llama 4 shares: words split where lower
# case turns upper, an English contraction stays with its word, numbers come in up to three digits.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(
    [
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
END_OF_MESSAGE = "<|eom|>"
END_OF_TURN = "<|eot|>"

# What the small vocabulary keeps of Llama 4's special tokens, in Llama 4's order.
SMALL_SPECIALS = (
    BEGIN,
    END,
    HEADER_START,
    HEADER_END,
    END_OF_MESSAGE,
    END_OF_TURN,
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)
_SMALL_FILE = Path(__file__).with_name("vocabulary") / "small.json"


def llama4_specials() -> list[str]:
    """Llama 4's 2 048 special tokens in the order of their ids, which follow the base vocabulary.

    With Meta's 200 000 base tokens: begin_of_text 200000, header_start 200005, image_start 200080,
    patch 200092, the last reserved one 202047.
    """

    def reserved(family: str, numbers: range) -> list[str]:
        return [f"<|{family}reserved_special_token_{i}|>" for i in numbers]

    text, vision, reasoning = "text_post_train_", "vision_", "reasoning_"
    named = [
        *[BEGIN, END, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
        *[HEADER_START, HEADER_END, END_OF_MESSAGE, END_OF_TURN, "<|step|>"],
        *reserved(text, range(6)),
        *["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"],
        *reserved(text, range(8, 69)),
        *["<|image_start|>", "<|image_end|>"],
        *reserved(vision, range(2)),
        *["<|tile_x_separator|>", "<|tile_y_separator|>"],
        *reserved(vision, range(2, 6)),
        "<|image|>",
        *reserved(vision, range(6, 7)),
        "<|patch|>",
        *reserved(vision, range(7, 1048)),
        *reserved(reasoning, range(8)),
        *["<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"],
    ]
    return named + reserved("", range(2048 - len(named)))


class Tokenizer:
    """Text to ids and back.

    Special tokens are written by id only (``special``, ``header``): their names inside a text are
    encoded as the characters they are, so no user can inject one.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer of the ``tokenizers`` library that knows Llama 4's special tokens.

        Raises:
            UserError: a special token that every prompt needs is missing.
        """
        # Not part of the backend's JSON, so it is set here, the one place all instances pass.
        backend.encode_special_tokens = True
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size: int = backend.get_vocab_size()
        self.bos = self.special(BEGIN)
        self.eot = self.special(END_OF_TURN)
        self.stop_ids = (self.special(END), self.special(END_OF_MESSAGE), self.eot)
        self._headers = {
            role: self._make_header(role) for role in ("system", "user", "assistant", "ipython")
        }

    @classmethod
    def load(cls, source: str | Path = "small") -> Self:
        """Load the shipped vocabulary or one from disk.

        Args:
            source: ``small``; or the path of a JSON file of the ``tokenizers`` library; or the path
                of Meta's ``tokenizer.model`` (a base64 token and its rank on each line), to which
                Llama 4's 2 048 special tokens are added.

        Raises:
            UserError: the file is missing or is neither of the two.
        """
        path = _SMALL_FILE if str(source) == "small" else Path(source)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {path}: {error.strerror}; give 'small', a tokenizers JSON file "
                f"or Meta's tokenizer.model"
            ) from None
        if data.lstrip().startswith(b"{"):
            try:
                return cls.from_json(data.decode())
            except (UserError, UnicodeDecodeError) as error:
                raise UserError(f"tokenizer {path}: {error}") from None
        return cls(_assemble(_bpe_from_ranks(_read_ranks(path, data)), llama4_specials()))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The tokenizer that ``to_json`` wrote.

        Raises:
            UserError: not the JSON of a tokenizer, or one without Llama 4's special tokens.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not the JSON of a tokenizer ({error})") from None
        return cls(backend)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SMALL_SPECIALS
    ) -> Self:
        """Train a vocabulary of ``vocab_size`` tokens, ``specials`` included and last.

        The same texts give the same vocabulary. All 256 bytes are tokens, so any text round-trips.

        Raises:
            ValueError: the texts hold too few different pairs for so many tokens.
        """
        backend = _assemble(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            initial_alphabet=_BYTE_LETTERS,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens(list(specials))
        if backend.get_vocab_size() != vocab_size:
            raise ValueError(
                f"the texts yield {backend.get_vocab_size()} tokens, not {vocab_size}: "
                f"give more text or ask for fewer tokens"
            )
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; names of special tokens in it are plain characters."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def special(self, name: str) -> int:
        """The id of a special token, by its full name such as ``<|patch|>``.

        Raises:
            UserError: the vocabulary has no special token of this name.
        """
        try:
            return self._special_ids[name]
        except KeyError:
            nearest = difflib.get_close_matches(name, self._special_ids, cutoff=0.4)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else "nor a similar one"
            raise UserError(f"the vocabulary has no special token {name!r}; {hint}") from None

    def header(self, role: str) -> list[int]:
        """The ids that open a turn: header start, the role, header end, an empty line."""
        return list(self._headers.get(role) or self._make_header(role))

    def _make_header(self, role: str) -> list[int]:
        start, end = self.special(HEADER_START), self.special(HEADER_END)
        return [start, *self.encode(role), end, *self.encode("\n\n")]

    def to_json(self) -> str:
        """All of the tokenizer as JSON of the ``tokenizers`` library."""
        text: str = self._backend.to_str()
        return text

    @property
    def fingerprint(self) -> str:
        """A short hash of every token and its id."""
        vocabulary = sorted(self._backend.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:12]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle through JSON: the backend's own pickle forgets not to parse special tokens."""
        return type(self).from_json, (self.to_json(),)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, as GPT-2's ``encoder.py`` assigns them.

    Printable Latin-1 bytes stand for themselves, the others take the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


_BYTE_LETTERS = _byte_letters()


def _assemble(model: models.BPE, specials: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A BPE model with o200k's splitting, byte letters, and special tokens behind its words."""
    backend = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(O200K_PATTERN), behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Tokens and ranks of a file in tiktoken's format.

    Raises:
        UserError: a line is malformed, ranks do not count 0, 1, 2, ..., or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"tokenizer {path}, line {number}: expected a base64 token and its rank, got "
                f"{line[:40]!r}; give a tokenizers JSON file or Meta's tokenizer.model, complete"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"tokenizer {path}: ranks do not count 0, 1, 2, ...; the file is damaged")
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise UserError(f"tokenizer {path}: {missing} of the 256 bytes have no token")
    return ranks


def _bpe_from_ranks(ranks: dict[bytes, int]) -> models.BPE:
    """The BPE model that tokenises as tiktoken does with these ranks.

    tiktoken knows no merges: it joins whichever neighbours make the token of lowest rank. So every
    split of a token into two tokens is a merge of that token's rank. (Where two splits of one token
    compete, tiktoken takes the leftmost and this model the earlier merge; no text that showed the
    difference was found in 400 000 random ones, over trained and over random ranks.)
    """
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(left, right) for left, right in halves if left in ranks and right in ranks]
    letters = {token: _to_letters(token) for token in ranks}
    return models.BPE(
        vocab={letters[token]: rank for token, rank in ranks.items()},
        merges=[(letters[left], letters[right]) for left, right in merges],
        ignore_merges=True,  # a whole word that is a token needs no merging, as in tiktoken
    )


def _to_letters(token: bytes) -> str:
    return "".join([_BYTE_LETTERS[byte] for byte in token])
