"""Cross-attention: what may see what, a start as the plain model, and decoding."""

import inspect
import math
import re

import pytest
import torch
from torch import Tensor

from fusion.cross_attention import CrossAttention, visible_tiles
from sandbox.backbone.cache import KVCache
from sandbox.backbone.transformer import Backbone
from tests.crossing import (
    ADAPTER,
    BACKBONE,
    GRID,
    IMAGE,
    LAYERS,
    LOGITS,
    D,
    V,
    decode,
    features,
    layout,
    ours,
    row,
    run_ours,
)

# --- What may see what ----------------------------------------------------------------------------


def test_the_rule_is_as_drawn() -> None:
    """Guards against code and drawing that tell different stories."""
    text = inspect.getdoc(visible_tiles) or ""
    drawn = re.findall(r"^    ([.1] [.1] [.1])      ([.1] [.1] [.1])$", text, re.MULTILINE)
    assert len(drawn) == 6
    for column, scope in enumerate(("every", "latest")):
        expected = [[cell == "1" for cell in line[column].split()] for line in drawn]
        assert visible_tiles(torch.tensor([[1, 3, 4]]), 6, scope)[0].tolist() == expected


@pytest.mark.parametrize("scope", ["every", "latest"])
def test_documents_and_branches_hide_images(scope: str) -> None:
    """Guards against packed samples, and questions that share a prefix, seeing others' images."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, -1]])
    branches = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2, 0]])
    starts = torch.tensor([[1, 3, 6, 10]])  # the last is the padding of a row with fewer tiles
    seen = visible_tiles(starts, 10, scope, documents, branches)[0].int().tolist()
    assert [line[0] for line in seen] == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    trunk = [0, 0, 0, 1, 1, 1, int(scope == "every"), 1, 1, 0]  # hidden by the branch's own image
    assert [line[1] for line in seen] == trunk
    assert [line[2] for line in seen] == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert [line[3] for line in seen] == [0] * 10


def test_tiles_of_one_image_are_seen_together() -> None:
    """Guards against a latest tile where the latest image is meant."""
    seen = visible_tiles(torch.tensor([[1, 1, 3, 3]]), 5, "latest")[0].int().tolist()
    assert seen == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


# --- Promises ------------------------------------------------------------------------------------


def test_the_adapted_model_starts_as_the_plain_one() -> None:
    """Guards against adapters that disturb a trained language model before their first step."""
    torch.manual_seed(0)
    fusion, backbone = CrossAttention(V, GRID, D, **ADAPTER), Backbone(BACKBONE)
    rows = [row(".I..I.."), row("..I....")]
    logits = run_ours(fusion, backbone, rows, features(3))
    assert torch.equal(logits, backbone.unembed(backbone(torch.tensor(rows)).hidden))
    logits.square().sum().backward()  # and the gates can open
    assert all(a.attention_gate.grad.any() for a in fusion.adapters.values())
    assert all(a.ffn_gate.grad.any() for a in fusion.adapters.values())


def test_gates_are_those_that_the_adapters_apply() -> None:
    """Guards against raw gates, or another layer's or branch's, told as the share that is added."""
    fusion, _ = ours()
    assert list(fusion.gates) == list(LAYERS)
    for layer, told in fusion.gates.items():
        adapter = fusion.adapters[str(layer)]
        assert told.keys() == {"attention", "ffn"}
        for branch, share in told.items():
            raw = getattr(adapter, f"{branch}_gate").item()
            assert share == pytest.approx(math.tanh(raw), rel=1e-6)
            assert share != raw


def test_embeddings_are_handed_on() -> None:
    """Guards against a fusion that touches the text itself."""
    fusion, backbone = ours()
    prompt = layout([row(".I..")])
    embeds = backbone.embed(prompt.tokens)
    fused = fusion(embeds, features(1), prompt)
    assert fused.embeds is embeds
    assert set(fused.adapters) == set(LAYERS)


@pytest.mark.parametrize("hf_compat", [True, False])
@pytest.mark.parametrize("text", ["..I..", "..I.....", "....."])
def test_rows_do_not_depend_on_the_batch(text: str, hf_compat: bool) -> None:
    """Guards against padded vision tokens that take part in a softmax."""
    fusion, backbone = ours(hf_compat=hf_compat)
    vision, images = features(4), text.count("I")
    alone = run_ours(fusion, backbone, [row(text)], vision[:images])
    beside = run_ours(fusion, backbone, [row(text), row(".I.II...")], vision[: images + 3])
    torch.testing.assert_close(beside[0, : len(text)], alone[0], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("hf_compat", [True, False])
@pytest.mark.parametrize("texts", [(".I...", "I.."), ("..I..", "..."), ("...", ".I..")])
def test_packed_documents_are_as_if_alone(texts: tuple[str, str], hf_compat: bool) -> None:
    """Guards against packing that lets a sample see another's image (nanoVLM #204)."""
    fusion, backbone = ours(hf_compat=hf_compat)
    rows, counts = [row(text) for text in texts], [text.count("I") for text in texts]
    documents = torch.tensor([[0] * len(texts[0]) + [1] * len(texts[1])])
    prompt = layout([[*rows[0], *rows[1]]], documents=documents)
    vision = features(sum(counts))
    fused = fusion(backbone.embed(prompt.tokens), vision, prompt)
    hidden = backbone(
        embeds=fused.embeds,
        positions=torch.tensor([[*range(len(texts[0])), *range(len(texts[1]))]]),
        documents=documents,
        adapters=fused.adapters,
        context=fused.context,
    ).hidden
    alone = [
        run_ours(fusion, backbone, [tokens], tiles)[0]
        for tokens, tiles in zip(rows, vision.split(counts), strict=True)
    ]
    torch.testing.assert_close(backbone.unembed(hidden)[0], torch.cat(alone), atol=LOGITS, rtol=0)


def test_branches_do_not_see_each_others_images() -> None:
    """Guards against questions that share a prefix and look at another question's image."""
    fusion, backbone = ours()
    branches = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]])
    prompt = layout([row(".I..I..I.")], branches=branches)

    def run(vision: Tensor) -> Tensor:
        fused = fusion(backbone.embed(prompt.tokens), vision, prompt)
        return backbone(
            embeds=fused.embeds,
            positions=positions,
            branches=branches,
            adapters=fused.adapters,
            context=fused.context,
        ).hidden[0]

    vision = features(3)
    before = run(vision)
    for tile, reached in enumerate(([1, 2, 3, 4, 5, 6, 7, 8], [4, 5], [7, 8])):
        changed = vision.clone()
        changed[tile] += 1
        assert (run(changed) != before).any(1).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("hf_compat", [True, False])
@pytest.mark.parametrize("scope", ["every", "latest"])
def test_cached_decoding_equals_the_full_forward(scope: str, hf_compat: bool) -> None:
    """Guards against a context that is lost, widened, or given to another row while decoding.

    Rows of unequal length, one token at a time; one row leaves on the way, and one prompt ends
    with its image, which only the last of its tokens sees.
    """
    uncached = ours(scope=scope, hf_compat=hf_compat)
    fusion, backbone = ours(scope=scope, hf_compat=hf_compat)
    calls: list[str] = []
    for adapter in fusion.adapters.values():
        adapter.attention.key.register_forward_hook(lambda *_: calls.append("key"))
    rows = [row(".I..I..."), row("..."), row("....I")]
    vision = list(features(3).split([2, 0, 1]))
    prompt = layout(rows)
    with torch.no_grad():
        fused = fusion(backbone.embed(prompt.tokens), torch.cat(vision), prompt)
        cache = KVCache(BACKBONE, len(rows), 16, like=fused.embeds)
        hidden = decode(backbone, fused, prompt, cache=cache)
        last = cache.lengths - 1
        hidden, context = hidden[torch.arange(len(rows)), last], fused.context.decoding(last)
        for step in range(6):
            logits = backbone.unembed(hidden)
            expected = [
                run_ours(*uncached, [r], v)[0, -1] for r, v in zip(rows, vision, strict=True)
            ]
            torch.testing.assert_close(logits, torch.stack(expected), atol=LOGITS, rtol=0)
            chosen = logits[:, :IMAGE].argmax(1)  # a word: no image comes with a reply
            assert chosen.tolist() == [int(e[:IMAGE].argmax()) for e in expected]
            rows = [[*r, token] for r, token in zip(rows, chosen.tolist(), strict=True)]
            if step == 2:
                kept = torch.tensor([0, 2])
                rows, vision, chosen = [rows[0], rows[2]], [vision[0], vision[2]], chosen[kept]
                context = context.select(kept)
                cache.select(kept)
            decoded = backbone(
                chosen[:, None], cache=cache, adapters=fused.adapters, context=context
            )
            hidden = decoded.hidden[:, 0]
    assert len(calls) == len(LAYERS)  # vision keys are made once a prompt, not at each step


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16"])
def test_half_precision(mixed: bool) -> None:
    """Guards against norms that leave queries and keys in another dtype than the values."""
    fusion, backbone = ours()
    rows, vision = [row("..I..")], features(1)
    expected = run_ours(fusion, backbone, rows, vision)
    if mixed:
        with torch.autocast("cpu", torch.bfloat16):
            logits = run_ours(fusion, backbone, rows, vision)
    else:
        logits = run_ours(fusion.bfloat16(), backbone.bfloat16(), rows, vision.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"patches": torch.tensor([[False, True, True]])},
            r"holds 2 image placeholders.* 0 tokens",
        ),
        ({"tile_rows": torch.tensor([0])}, r"of 2 tiles, but 1 tile_rows and 2 tile_starts"),
        ({"tile_starts": torch.tensor([1])}, r"of 2 tiles, but 2 tile_rows and 1 tile_starts"),
        ({"tile_starts": torch.tensor([2, 1])}, r"\[2, 1\] must name .* from left to right"),
        ({"tile_starts": torch.tensor([1, 3])}, r"\[1, 3\] must name .* 1 rows and 3 tokens"),
        ({"tile_rows": torch.tensor([0, 1])}, r"tile_rows \[0, 1\] .* 1 rows and 3 tokens"),
    ],
)
def test_images_that_are_not_where_they_should_be(change: dict[str, Tensor], message: str) -> None:
    """Guards against a tile that silently goes to another row, or to none."""
    fusion, backbone = ours()
    prompt = layout([row(".II")], **change)
    with pytest.raises(ValueError, match=message):
        fusion(backbone.embed(prompt.tokens), features(2), prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": [1, 1]}, r"layers=\[1, 1\]"),
        ({"layers": [-1]}, r"layers=\[-1\]"),
        ({"heads": 3, "kv_heads": 2}, r"heads \(3\) must divide by kv_heads \(2\)"),
        ({"scope": "last"}, r"scope='last': choose every or latest"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    """Guards against an ablation that varies an argument without effect."""
    with pytest.raises(ValueError, match=message):
        CrossAttention(V, GRID, D, **ADAPTER | arguments)
