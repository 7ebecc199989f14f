"""Examples to batches: padding, packing, numbering of answers."""

from dataclasses import replace

import pytest
import torch
from PIL import Image as PILImage

from fusion.layout import IMAGE, IMAGE_START
from sandbox.data.batch import IGNORE, PADDING, Batch, collate, pack
from sandbox.data.prompt import Prompt, PromptEncoder
from sandbox.data.task import Question, Sample
from sandbox.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load()
SIZE = 4
RED, GREEN, BLUE = (PILImage.new("RGB", (6, 5), color) for color in ("red", "lime", "blue"))


def encoder(tokens_per_tile: int = 2) -> PromptEncoder:
    return PromptEncoder(TOKENIZER, SIZE, tokens_per_tile)


def sample(*answers: str, images: int = 1) -> Sample:
    """A sample whose k-th question is of ``kind k``."""
    questions = [
        Question(f"What is the value of {number}?", answer, f"kind {number}")
        for number, answer in enumerate(answers, start=1)
    ]
    return Sample((RED, GREEN, BLUE)[:images], tuple(questions), "content")


def test_one_plain_row_needs_no_documents_and_no_branches() -> None:
    """Guards against a mask where plain causal attention is enough (and faster)."""
    example = encoder().encode(Prompt.ask("What?", [RED]))
    batch = collate([example], name="test 3")
    assert batch.documents is None
    assert batch.branches is None
    assert batch.name == "test 3"
    assert batch.tokens.shape == (1, len(example))
    assert batch.tokens.dtype == torch.int64
    assert batch.patches.dtype == torch.bool
    assert batch.tiles.dtype == torch.uint8


def test_collate_pads_on_the_right() -> None:
    """Guards against padding that is attended to, learned, or taken for an image."""
    examples = [
        encoder().encode(Prompt.ask("What?")),
        encoder().encode_sample(sample("7", "9", images=2)),
        encoder().encode_sample(sample("top left")),
    ]
    batch = collate(examples)
    assert batch.documents is not None
    assert batch.branches is not None
    assert batch.tokens.shape == (3, max(map(len, examples)))
    for row, example in enumerate(examples):
        n = len(example)
        assert batch.tokens[row, :n].tolist() == example.tokens.tolist()
        assert batch.labels[row, :n].tolist() == example.labels.tolist()
        assert batch.positions[row, :n].tolist() == example.positions.tolist()
        assert batch.branches[row, :n].tolist() == example.branches.tolist()
        assert batch.patches[row, :n].tolist() == example.patches.tolist()
        assert (batch.documents[row, :n] == 0).all()
        assert (batch.documents[row, n:] == PADDING).all()
        assert (batch.labels[row, n:] == IGNORE).all()
        assert (batch.answers[row, n:] == -1).all()
        assert not batch.patches[row, n:].any()
    assert batch.tile_rows.tolist() == [1, 1, 2]
    assert batch.tiles.shape == (3, 3, SIZE, SIZE)


def test_pack_separates_documents_and_numbers_answers_through() -> None:
    """Guards against packed samples that see each other, or whose answers get mixed up."""
    one = encoder().encode_sample(sample("7", "9"))
    two = encoder().encode_sample(sample("blue", images=2))
    three = encoder().encode_sample(sample("red", "top left", "0"))
    batch = pack([[one, two], [three]])
    assert batch.documents is not None
    n = len(one)
    row = [0] * n + [1] * len(two)
    assert batch.documents[0].tolist() == row + [PADDING] * (batch.tokens.shape[1] - len(row))
    assert batch.positions[0, n].item() == 0  # each document starts at position 0
    assert batch.tile_rows.tolist() == [0, 0, 0, 1]
    assert batch.kinds == (*one.kinds, *two.kinds, *three.kinds)
    for number, answer in enumerate(["7", "9", "blue", "red", "top left", "0"]):
        spelled = batch.labels[batch.answers == number]
        assert spelled.tolist() == [*TOKENIZER.encode(answer), TOKENIZER.eot]
    assert batch.answers.max() == 5


def test_packing_keeps_tiles_in_the_order_of_their_placeholders() -> None:
    """Guards against features scattered into another sample's placeholders."""
    images = [RED, GREEN, BLUE, GREEN]
    examples = [encoder(1).encode(Prompt.ask("?", [image])) for image in images]
    batch = pack([examples[:3], examples[3:]])
    brightest = [int(tile[:, 0, 0].argmax()) for tile in batch.tiles]
    assert brightest == [0, 1, 2, 1]
    patches_by_row = batch.patches.sum(dim=1)
    assert patches_by_row.tolist() == torch.bincount(batch.tile_rows).tolist() == [3, 1]


@pytest.mark.parametrize(("tokens_per_tile", "first"), [(0, IMAGE), (2, IMAGE_START)])
def test_tile_starts_name_the_first_token_of_each_image(tokens_per_tile: int, first: str) -> None:
    """Guards against images that text before them can see, or that their own text cannot."""
    one = encoder(tokens_per_tile).encode(Prompt.ask("What?", [RED, GREEN]))
    two = encoder(tokens_per_tile).encode_sample(sample("7", "9"))
    text = encoder(tokens_per_tile).encode(Prompt.ask("What?"))
    batch = pack([[one, text, two], [two], [text]])
    found = (batch.tokens == TOKENIZER.special(first)).nonzero()
    assert torch.stack((batch.tile_rows, batch.tile_starts), dim=1).tolist() == found.tolist()
    assert len(found) == len(batch.tiles) == 4


def test_packing_one_full_row_keeps_documents() -> None:
    """Guards against dropping the documents of a row that is full: its samples would mix."""
    example = encoder().encode(Prompt.ask("What?"))
    assert pack([[example, example]]).documents is not None
    assert collate([example, example]).documents is None


def test_text_only_batch_has_no_tiles() -> None:
    """Guards against text-only batches that break stacking or call the encoder for nothing."""
    batch = collate([encoder().encode(Prompt.ask("What?")) for _ in range(2)])
    assert batch.tiles.shape == (0, 3, SIZE, SIZE)
    assert batch.tile_rows.shape == (0,)
    assert batch.tile_rows.dtype == torch.int64
    assert not batch.patches.any()


def test_moving_a_batch_keeps_everything() -> None:
    """Guards against a field that stays behind on the CPU or is lost on the way."""
    batch = collate(
        [encoder().encode_sample(sample("7", "9")), encoder().encode_sample(sample("7"))]
    )
    moved = batch.to("meta")
    before, after = ({**vars(b), **b.places._asdict(), "found": None} for b in (batch, moved))
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert after[name].device.type == "meta", name
            assert after[name].shape == value.shape
        else:
            assert after[name] == value


def test_an_answer_is_right_only_in_every_token() -> None:
    """Guards against scores per token that pass for scores per answer, and mixed-up answers."""
    batch = pack(
        [
            [encoder().encode_sample(sample("7", "top left"))],
            [encoder().encode_sample(sample("red"))],
        ]
    )
    everything = torch.ones_like(batch.tokens, dtype=torch.bool)
    assert batch.answered(everything).tolist() == [True, True, True]
    # Places without an answer do not count.
    assert batch.answered(batch.answers >= 0).tolist() == [True, True, True]
    for number in range(3):
        for place in (batch.answers == number).nonzero():
            missed = everything.clone()
            missed[tuple(place)] = False
            assert batch.answered(missed).tolist() == [k != number for k in range(3)]


def test_places_are_those_of_the_tensors() -> None:
    """Guards against indices that point at padding, or at the token beside the labelled one."""
    examples = [encoder().encode(Prompt.ask("What?")), encoder().encode_sample(sample("7"))]
    batch = collate(examples)
    places = batch.places
    assert places.real is not None
    assert batch.real_tokens == len(places.real) == sum(map(len, examples))
    assert (batch.labels.flatten()[places.labelled] != IGNORE).all()
    assert len(places.labelled) == (batch.labels != IGNORE).sum()
    assert batch.patches.flatten()[places.placeholders].all()
    assert sum(places.placeholder_counts) == len(places.placeholders) == batch.patches.sum()
    assert places.tile_counts == (0, 1)
    assert places.ordered
    assert collate(examples[:1]).places.real is None


def test_a_loaded_batch_knows_its_places() -> None:
    """Guards against places that are found on the device, where the host would wait."""
    assert collate([encoder().encode_sample(sample("7"))]).found is not None


@pytest.mark.parametrize(("rows", "starts"), [([1, 0], [0, 0]), ([0, 0], [3, 1]), ([0], [0, 1])])
def test_tiles_out_of_order_are_noticed(rows: list[int], starts: list[int]) -> None:
    """Guards against an image that lands in another row."""
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    assert not Batch.of(
        tokens, tile_rows=torch.tensor(rows), tile_starts=torch.tensor(starts)
    ).ordered


def test_a_changed_batch_finds_its_places_anew() -> None:
    """Guards against a loss over the places of the labels that a batch had before."""
    batch = collate(
        [encoder().encode_sample(sample("7")), encoder().encode_sample(sample("7", "9"))]
    )
    none = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    assert len(none.places.labelled) == 0
    assert len(batch.places.labelled) > 0
    wrong = torch.where(batch.labels == IGNORE, 1, batch.labels)
    with pytest.raises(ValueError, match="labels stand on padding"):
        assert replace(batch, labels=wrong).places
