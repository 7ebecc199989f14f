"""Projectors: the drawn example, Llama 4's own code, and the scale they start with."""

import re
from inspect import getdoc

import pytest
import torch
from torch import autograd
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.llama4.configuration_llama4 import (
    Llama4Config,
    Llama4TextConfig,
    Llama4VisionConfig,
)

from fusion.projectors import LinearProjector, PixelShuffleMLP, pixel_shuffle

PROJECTORS = [PixelShuffleMLP, LinearProjector]


def test_pixel_shuffle_is_as_drawn() -> None:
    """Guards against blocks cut across rows and against tokens in column order."""
    drawing = [
        [int(number) for number in block.split()]
        for block in re.findall(r"\[([ \d]+)\]", getdoc(pixel_shuffle) or "")
    ]
    assert drawing == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    patches = torch.arange(16).view(1, 16, 1)
    assert pixel_shuffle(patches, 2)[0].tolist() == drawing


def test_channels_are_ordered_dy_dx_c() -> None:
    """Guards against torch's own order (c, dy, dx), which has the same shape."""
    patches = torch.tensor([[[0, 10], [1, 11], [2, 12], [3, 13]]])  # two channels of a 2 x 2 grid
    assert pixel_shuffle(patches, 2).flatten().tolist() == [0, 10, 1, 11, 2, 12, 3, 13]


@pytest.mark.parametrize(("side", "block"), [(2, 1), (2, 2), (4, 2), (6, 2), (4, 4), (8, 4)])
def test_pixel_shuffle_equals_transformers(side: int, block: int) -> None:
    """Guards against an order that Llama 4's adapter weights never saw."""
    patches = torch.randn(3, side * side, 16)
    assert torch.equal(pixel_shuffle(patches, block), llama4.pixel_shuffle(patches, 1 / block))


def test_mlp_equals_transformers() -> None:
    """Guards against a lost second GELU, an added bias, or layers in another order."""
    V, D, hidden = 12, 20, 28
    vision = Llama4VisionConfig(
        hidden_size=V,
        intermediate_size=4 * V,
        num_attention_heads=2,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=hidden,
        projector_output_dim=hidden,
        vision_output_dim=hidden,
        projector_dropout=0.0,
    )
    config = Llama4Config(vision_config=vision, text_config=Llama4TextConfig(hidden_size=D))
    adapter = llama4.Llama4VisionPixelShuffleMLP(config.vision_config)
    last = llama4.Llama4MultiModalProjector(config)
    ours = PixelShuffleMLP(V, 4, D, hidden=hidden, scale=1.0)
    adapter.mlp.fc1.weight = ours.fc1.weight
    adapter.mlp.fc2.weight = ours.fc2.weight
    last.linear_1.weight = ours.project.weight
    assert len(list(ours.parameters())) == len([*adapter.parameters(), *last.parameters()])
    features = torch.randn(3, 16, V)
    torch.testing.assert_close(ours(features), last(adapter(features)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", PROJECTORS)
@pytest.mark.parametrize(("shuffle", "tokens"), [(1, 36), (2, 9), (3, 4), (6, 1)])
def test_tokens_per_tile_are_made(cls: type, shuffle: int, tokens: int) -> None:
    """Guards against prompts with another number of placeholders than the projector fills."""
    projector = cls(8, 6, 10, shuffle=shuffle)
    assert projector.tokens_per_tile == tokens
    assert projector(torch.randn(2, 36, 8)).shape == (2, tokens, 10)
    assert projector(torch.randn(0, 36, 8)).shape == (0, tokens, 10)


@pytest.mark.parametrize("cls", PROJECTORS)
@pytest.mark.parametrize("shuffle", [0, 4, 12])
def test_a_grid_that_does_not_divide_is_refused(cls: type, shuffle: int) -> None:
    """Guards against patches lost at the edge."""
    with pytest.raises(ValueError, match=f"6 x 6 patches does not divide.*shuffle={shuffle}"):
        cls(8, 6, 10, shuffle=shuffle)


@pytest.mark.parametrize("cls", PROJECTORS)
@pytest.mark.parametrize(("encoder_width", "width"), [(64, 512), (512, 64)])
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_tokens_start_at_scale(cls: type, encoder_width: int, width: int, scale: float) -> None:
    """Guards against images that start fainter or louder than text, by an amount set by widths."""
    torch.manual_seed(0)
    projector = cls(encoder_width, 4, width, scale=scale)
    tokens = projector(torch.randn(64, 16, encoder_width))
    assert tokens.square().mean().sqrt().item() == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize("cls", PROJECTORS)
def test_training_repeats_and_converges(cls: type) -> None:
    """Guards against a dead start (vanishing gradients) and against hidden randomness."""

    def losses() -> list[float]:
        torch.manual_seed(0)
        projector = cls(8, 4, 10, shuffle=2, scale=1.0)
        weights = list(projector.parameters())
        features, target = torch.randn(1, 16, 8), torch.randn(1, 4, 10)
        history = []
        for _ in range(200):
            loss = (projector(features) - target).square().mean()
            history.append(loss.item())
            with torch.no_grad():
                for weight, gradient in zip(weights, autograd.grad(loss, weights), strict=True):
                    weight -= 0.3 * gradient
        return history

    first = losses()
    assert first == losses()
    assert first[-1] < 0.1 * first[0]
