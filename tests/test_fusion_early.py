"""What every fusion must do (a new file in ``fusion`` is tested here unasked), and early fusion."""

import importlib
import inspect
import json
import pkgutil
import re

import pytest
import torch
from torch import Tensor

import fusion
from fusion.base import Fused, Fusion
from fusion.early import EarlyFusion
from fusion.layout import IMAGE, IMAGE_END, IMAGE_START, PATCH, TILE_X, TILE_Y, image_span
from sandbox.data.batch import Batch

V, GRID, D = 24, 4, 32  # of the toy encoder and backbone

# Arguments besides the three widths, for classes whose defaults do not suit toy widths.
TOY: dict[str, dict[str, object]] = {}


def found() -> list[type[Fusion]]:
    """The concrete fusions that the room's files define."""
    classes: list[type[Fusion]] = []
    for file in pkgutil.iter_modules(fusion.__path__):
        module = importlib.import_module(f"fusion.{file.name}")
        classes += [
            cls
            for _, cls in inspect.getmembers(module, inspect.isclass)
            if issubclass(cls, Fusion)
            and not inspect.isabstract(cls)
            and cls.__module__ == module.__name__
        ]
    return classes


def build(cls: type[Fusion]) -> Fusion:
    """A fusion without zeros: gates that start closed would hide what is behind them."""
    torch.manual_seed(0)
    built = cls(V, GRID, D, **TOY.get(cls.__name__, {}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def batch(tokens_per_tile: int, images: list[int]) -> Batch:
    """Rows of a word, then so many images, then three words; token 0 is a word, 1 an image."""
    prompts = [
        ["word", *image_span(tokens_per_tile) * count, "word", "word", "word"] for count in images
    ]
    T = max(map(len, prompts))
    prompts = [[*prompt, *["word"] * (T - len(prompt))] for prompt in prompts]
    span = len(image_span(tokens_per_tile))
    starts = [1 + span * image for count in images for image in range(count)]
    tokens = torch.tensor([[int(name == IMAGE) for name in prompt] for prompt in prompts])
    return Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, -100),
        positions=torch.arange(T).expand_as(tokens),
        answers=torch.full_like(tokens, -1),
        patches=torch.tensor([[name == PATCH for name in prompt] for prompt in prompts]),
        tiles=torch.zeros(sum(images), 3, 8, 8, dtype=torch.uint8),
        tile_rows=torch.arange(len(images)).repeat_interleave(torch.tensor(images)),
        tile_starts=torch.tensor(starts, dtype=torch.int64),
    )


def inputs(layout: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings and patch features for a batch, both leaves that want gradients."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(*layout.tokens.shape, D, generator=generator)
    features = torch.randn(len(layout.tiles), GRID**2, V, generator=generator)
    return embeds.requires_grad_(), features.requires_grad_()


def read(fused: Fused) -> Tensor:
    """What the layers of a backbone would see: embeddings, changed by each adapter in turn."""
    hidden = fused.embeds
    for _, adapter in sorted(fused.adapters.items(), key=lambda item: item[0]):
        hidden = adapter(hidden, fused.context)
    return hidden


every_fusion = pytest.mark.parametrize("cls", found(), ids=lambda cls: cls.__name__)


def test_the_search_finds_fusions() -> None:
    """Guards against a search that silently finds nothing, and so tests nothing."""
    assert {"EarlyFusion", "CrossAttention"} <= {cls.__name__ for cls in found()}


@every_fusion
def test_shapes(cls: type[Fusion]) -> None:
    """Guards against a fusion that adds, drops or widens tokens behind the prompt's back."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1, 0, 2])
    embeds, features = inputs(layout)
    assert built.tokens_per_tile >= 0
    assert read(built(embeds, features, layout)).shape == embeds.shape


@every_fusion
def test_text_alone_is_untouched(cls: type[Fusion]) -> None:
    """Guards against a multimodal model that is no longer the plain decoder on text."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [0, 0])
    embeds, features = inputs(layout)
    hidden = read(built(embeds, features, layout))
    assert torch.equal(hidden, embeds)
    hidden.sum().backward()
    assert torch.equal(embeds.grad, torch.ones_like(embeds))


@every_fusion
def test_rows_without_images_are_untouched(cls: type[Fusion]) -> None:
    """Guards against one row's images leaking into another row's text."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1, 0, 2])
    embeds, features = inputs(layout)
    assert torch.equal(read(built(embeds, features, layout))[1], embeds[1])


@every_fusion
def test_each_tile_reaches_its_own_row_alone(cls: type[Fusion]) -> None:
    """Guards against tiles attached to the wrong row or dropped."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1, 0, 2])
    embeds, features = inputs(layout)
    before = read(built(embeds, features, layout))
    for tile, row in enumerate([0, 2, 2]):
        changed = features.detach().clone()
        changed[tile] += 1
        after = read(built(embeds, changed, layout))
        rows = (after != before).flatten(1).any(1)
        assert rows.nonzero().flatten().tolist() == [row]


@every_fusion
def test_text_before_an_image_does_not_see_it(cls: type[Fusion]) -> None:
    """Guards against vision leaking into earlier text (transformers #39379, #47845)."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1])
    embeds, features = inputs(layout)
    hidden = read(built(embeds, features, layout))
    assert torch.equal(hidden[:, 0], embeds[:, 0])


@every_fusion
def test_gradients_reach_every_parameter(cls: type[Fusion]) -> None:
    """Guards against weights that nothing uses, and against detached features or embeddings."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    hidden = read(built(embeds, features, layout))
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, tensor in [*built.named_parameters(), ("embeds", embeds), ("features", features)]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@every_fusion
def test_inputs_are_not_written_to(cls: type[Fusion]) -> None:
    """Guards against in-place writes, which corrupt the embedding's gradient without an error."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    kept = embeds.detach().clone(), features.detach().clone()
    read(built(embeds, features, layout))
    assert torch.equal(embeds, kept[0])
    assert torch.equal(features, kept[1])


@every_fusion
def test_same_seed_same_result(cls: type[Fusion]) -> None:
    """Guards against randomness outside the seed, in building or in (training-mode) running."""
    first, second = build(cls), build(cls)
    layout = batch(first.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    expected = read(first(embeds, features, layout))
    assert torch.equal(read(first(embeds, features, layout)), expected)
    assert torch.equal(read(second(embeds, features, layout)), expected)


@every_fusion
def test_a_placeholder_too_many_is_refused(cls: type[Fusion]) -> None:
    """Guards against silent corruption of the embeddings; the message holds both counts."""
    built = build(cls)
    layout = batch(built.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    layout.patches[0, -1] = True
    needed = 3 * built.tokens_per_tile
    with pytest.raises(ValueError, match=rf"\b{needed + 1}\b.*\b{needed}\b"):
        built(embeds, features, layout)


@every_fusion
def test_rebuilt_from_init_args(cls: type[Fusion]) -> None:
    """Guards against checkpoints that cannot be rebuilt from their description, kept as JSON."""
    built = build(cls)
    rebuilt = cls(**json.loads(json.dumps(built.init_args)))
    rebuilt.load_state_dict(built.state_dict())
    layout = batch(built.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    expected = read(built(embeds, features, layout))
    assert torch.equal(read(rebuilt(embeds, features, layout)), expected)


def test_rows_are_as_drawn() -> None:
    """Guards against code and drawing telling different stories: an image, text alone, two images.

    Each word becomes a number; projected features are numbered behind the words.
    """
    lines = re.findall(r"\[(.*?)\].*?\[(.*?)\]", inspect.getdoc(EarlyFusion) or "")
    before, after = ([row.split() for row in side] for side in zip(*lines, strict=True))
    assert ["P", "P", "P", "P", "same"] in before
    assert len(lines) == 3
    words = sorted({word for row in after for word in row} - {"a1", "a2", "b1", "b2", "c1", "c2"})
    number = {word: float(i) for i, word in enumerate([*words, "P", *"abc"])}
    number |= {f"{tile}{k}": number[tile] * 10 + k for tile in "abc" for k in (1, 2)}

    built = EarlyFusion(1, 2, 1, projector="linear", shuffle=1)
    built.projector = torch.nn.Identity()
    built.tokens_per_tile = 2
    features = torch.tensor([[[number[f"{tile}{k}"]] for k in (1, 2)] for tile in "abc"])
    patches = torch.tensor([[word == "P" for word in row] for row in before])
    layout = Batch.of(
        patches.long(),
        patches=patches,
        tile_rows=torch.tensor([0, 2, 2]),
        tile_starts=torch.tensor([2, 0, 2]),
    )
    embeds = torch.tensor([[[number[word]] for word in row] for row in before])
    fused = built(embeds, features, layout)
    assert fused.embeds[..., 0].tolist() == [[number[word] for word in row] for row in after]
    assert not fused.adapters


def test_blocks_are_as_drawn() -> None:
    """Guards against an image cut in two by its separators, or one that runs into the next."""
    drawing = inspect.getdoc(EarlyFusion) or ""
    tokens, blocks = (
        re.findall(rf"^ +{name} +(.*)$", drawing, re.MULTILINE)[0].split()
        for name in ("tokens", "blocks")
    )
    signs = {IMAGE_START: "(", IMAGE_END: ")", PATCH: "P", TILE_X: "|", TILE_Y: "|", IMAGE: "|"}
    images = [*image_span(1, 1, 2), *image_span(1)]
    assert tokens == ["see", *(signs[name] for name in images), "?"]

    built = EarlyFusion(V, GRID, D, shuffle=GRID, bidirectional=True)
    patches = torch.tensor([[token == "P" for token in tokens]])
    layout = Batch.of(
        patches.long(),
        patches=patches,
        tile_rows=torch.tensor([0, 0, 0, 0]),
        tile_starts=torch.tensor([1, 1, 1, 9]),
    )
    embeds, features = torch.randn(1, len(tokens), D), torch.randn(4, GRID**2, V)
    assert built(embeds, features, layout).blocks.tolist() == [[int(block) for block in blocks]]
    built.bidirectional = False
    assert built(embeds, features, layout).blocks is None


def test_a_batch_without_images_has_no_blocks() -> None:
    """Guards against text that pays for a mask since the model could see."""
    built = EarlyFusion(V, GRID, D, bidirectional=True)
    layout = batch(built.tokens_per_tile, [0, 0])
    assert built(*inputs(layout), layout).blocks is None


@pytest.mark.parametrize("projector", ["mlp", "linear"])
@pytest.mark.parametrize(("shuffle", "tokens"), [(1, 16), (2, 4), (4, 1)])
def test_tokens_per_tile(projector: str, shuffle: int, tokens: int) -> None:
    """Guards against prompts laid out for another shuffle than the projector's."""
    built = EarlyFusion(V, GRID, D, projector, shuffle)
    assert built.tokens_per_tile == tokens
    layout = batch(tokens, [1, 0, 2])
    embeds, features = inputs(layout)
    fused = built(embeds, features, layout).embeds
    assert torch.equal(fused[~layout.patches], embeds[~layout.patches])
    assert torch.equal(fused[layout.patches], built.projector(features).flatten(0, 1))


def test_summary_tokens_are_dropped() -> None:
    """Guards against a class token that takes the place of the first patch, and shifts the rest."""
    built = build(EarlyFusion)
    layout = batch(built.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    expected = built(embeds, features, layout).embeds
    summarised = torch.cat((torch.randn(3, 1, V), features), dim=1)
    assert torch.equal(built(embeds, summarised, layout).embeds, expected)


def test_gradients_of_replaced_embeddings_are_zero() -> None:
    """Guards against the placeholder's word embedding being trained by the image's place."""
    built = build(EarlyFusion)
    layout = batch(built.tokens_per_tile, [1, 2])
    embeds, features = inputs(layout)
    built(embeds, features, layout).embeds.sum().backward()
    assert torch.equal(embeds.grad.any(2), ~layout.patches)


def test_half_precision_embeddings_keep_their_dtype() -> None:
    """Guards against a residual stream that changes dtype where an image stands."""
    built = build(EarlyFusion)
    layout = batch(built.tokens_per_tile, [1])
    embeds, features = inputs(layout)
    assert built(embeds.bfloat16(), features, layout).embeds.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("images", "tile_rows", "message"),
    [
        ([1, 1], [0], r"holds 8 image placeholders, but 1 tiles make 4 .*row 1 holds 4 .* for 0"),
        ([1], [0, 0], r"holds 4 image placeholders, but 2 tiles make 8 .*row 0 holds 4 .* for 8"),
        ([0], [0], r"holds 0 image placeholders, but 1 tiles make 4 "),
        ([1, 1], [], r"holds 8 image placeholders, but 0 tiles make 0 "),
        ([2, 1], [0, 1, 1], r"row 0 holds 8 .* for 4 image tokens; row 1 holds 4 .* for 8"),
        ([1, 2], [1, 0, 1], r"tile_rows is not in the order of the rows"),
    ],
)
def test_mismatches_name_the_rows(images: list[int], tile_rows: list[int], message: str) -> None:
    """Guards against totals that agree while one row's image lands in another row."""
    built = build(EarlyFusion)
    layout = batch(built.tokens_per_tile, images)
    wrong = Batch.of(
        layout.tokens,
        patches=layout.patches,
        tile_rows=torch.tensor(tile_rows, dtype=torch.int64),
        tile_starts=torch.zeros(len(tile_rows), dtype=torch.int64),
    )
    embeds, _ = inputs(layout)
    with pytest.raises(ValueError, match=message):
        built(embeds, torch.randn(len(tile_rows), GRID**2, V), wrong)


@pytest.mark.parametrize("arguments", [{"projector": "conv"}, {"projector": "linear", "hidden": 8}])
def test_arguments_that_would_be_ignored_are_refused(arguments: dict[str, object]) -> None:
    """Guards against an ablation that varies an argument without effect."""
    with pytest.raises(ValueError, match="choose mlp, or linear and no hidden"):
        EarlyFusion(V, GRID, D, **arguments)
