"""What tests of the Llama 3.2 Vision baseline share: rows as drawings, a toy model, gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fusion.base import Fused
from fusion.cross_attention import CrossAttention
from sandbox.backbone.config import BackboneConfig
from sandbox.backbone.transformer import Backbone
from sandbox.data.batch import Batch

LOGITS = 2e-5  # agreement in fp32

V, GRID, D = 24, 2, 64
P = GRID**2 + 1  # with a class token, as Llama 3.2 Vision's encoder gives
IMAGE = 96  # the image token
# Dense, global and rotary everywhere: a Llama 3 decoder.
BACKBONE = BackboneConfig(
    vocab_size=97,
    input_only=8,
    width=D,
    layers=5,
    heads=4,
    kv_heads=2,
    head_dim=16,
    dense_hidden=80,
    experts=0,
    chunk=None,
    nope_every=0,
    qk_norm=False,
    temperature_scale=0.0,
    norm_eps=0.01,
)
LAYERS = (1, 3)  # that an adapter stands before
ADAPTER = {
    "layers": list(LAYERS),
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "hidden": 80,
    "norm_eps": 0.01,
}


def row(text: str) -> list[int]:
    """Tokens of a drawing such as ``..I.``: a dot is any word, ``I`` an image token."""
    generator = torch.Generator().manual_seed(len(text))
    words = torch.randint(0, IMAGE, (len(text),), generator=generator).tolist()
    return [IMAGE if letter == "I" else word for letter, word in zip(text, words, strict=True)]


def layout(rows: Sequence[Sequence[int]], **more: Tensor) -> Batch:
    """What a fusion reads of rows (padded on the right) with one tile for every image token."""
    T = max(map(len, rows))
    tokens = torch.tensor([[*tokens, *[0] * (T - len(tokens))] for tokens in rows])
    documents = torch.tensor([[0] * len(r) + [-1] * (T - len(r)) for r in rows])
    tile_rows, tile_starts = (tokens == IMAGE).nonzero(as_tuple=True)
    fields = {
        "tiles": torch.zeros(len(tile_rows), 3, 1, 1, dtype=torch.uint8),
        "tile_rows": tile_rows,
        "tile_starts": tile_starts,
        "documents": documents if bool(documents.any()) else None,
    }
    return Batch.of(tokens, **fields | more)


def features(tiles: int) -> Tensor:
    return torch.randn(tiles, P, V, generator=torch.Generator().manual_seed(1))


def randomize(module: nn.Module) -> None:
    """Weights that hide nothing: no zeros, no ones, and gates open."""
    for name, parameter in module.named_parameters():
        around = 1.0 if "norm" in name else 0.0
        nn.init.normal_(parameter, mean=around, std=0.7 if "gate" in name[-5:] else 0.2)


def ours(**arguments: object) -> tuple[CrossAttention, Backbone]:
    """A fusion and a backbone on random weights, the same at every call."""
    torch.manual_seed(0)
    fusion = CrossAttention(V, GRID, D, **ADAPTER | arguments)
    backbone = Backbone(BACKBONE)
    randomize(fusion)
    randomize(backbone)
    return fusion, backbone


def decode(backbone: Backbone, fused: Fused, prompt: Batch, **more: object) -> Tensor:
    """Hidden states of rows that all start at position 0."""
    return backbone(
        embeds=fused.embeds,
        positions=torch.arange(prompt.tokens.shape[1]).expand_as(prompt.tokens),
        documents=prompt.documents,
        adapters=fused.adapters,
        context=fused.context,
        **more,
    ).hidden


def run_ours(
    fusion: CrossAttention, backbone: Backbone, rows: Sequence[Sequence[int]], vision: Tensor
) -> Tensor:
    prompt = layout(rows)
    fused = fusion(backbone.embed(prompt.tokens), vision, prompt)
    return backbone.unembed(decode(backbone, fused, prompt))


def grouped(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs to compare by relative norm: tensor by tensor, but all gates as one.

    The gradient of a gate is a sum over all tokens and channels. Where it nearly cancels, rounding
    alone exceeds any relative tolerance.
    """
    assert set(got) == set(expected)
    gates = sorted(name for name in got if got[name].numel() == 1)
    pairs = {name: (got[name], expected[name]) for name in got if name not in gates}
    if gates:
        pairs["the gates"] = (
            torch.cat([got[name] for name in gates]),
            torch.cat([expected[name] for name in gates]),
        )
    return pairs
