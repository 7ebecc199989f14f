"""What every vision encoder must do; a new file in ``encoders`` is tested here unasked."""

import importlib
import inspect
import json
import pkgutil
from copy import deepcopy

import pytest
import torch
from torch import Tensor

import encoders
from encoders.base import VisionEncoder
from encoders.patches import Patches

# Arguments for classes whose defaults are too large for a test; others are built with none.
TOY: dict[str, dict[str, object]] = {
    "Llama4Vision": {
        "tile_size": 32,
        "patch_size": 8,
        "width": 24,
        "layers": 2,
        "heads": 3,
        "hidden": 40,
    },
    "MetaCLIP": {"tile_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 3},
    "MllamaVision": {
        "tile_size": 32,
        "patch_size": 8,
        "hidden": 24,
        "layers": 2,
        "global_layers": 1,
        "heads": 3,
        "ffn_hidden": 40,
        "intermediate_layers": [0],
        "max_tiles": 2,
    },
}


def found(kind: type) -> list[type]:
    """The concrete subclasses of ``kind`` that the room's files define."""
    classes: list[type] = []
    for file in pkgutil.iter_modules(encoders.__path__):
        module = importlib.import_module(f"encoders.{file.name}")
        classes += [
            cls
            for _, cls in inspect.getmembers(module, inspect.isclass)
            if issubclass(cls, kind)
            and not inspect.isabstract(cls)
            and cls.__module__ == module.__name__
        ]
    return classes


def build(cls: type[VisionEncoder]) -> VisionEncoder:
    """An encoder without zeros: gates that start closed would hide what is behind them."""
    torch.manual_seed(0)
    built = cls(**TOY.get(cls.__name__, {}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def tiles(encoder: VisionEncoder, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = encoder.tile_size
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


every_encoder = pytest.mark.parametrize("cls", found(VisionEncoder), ids=lambda cls: cls.__name__)


def test_the_search_finds_encoders() -> None:
    """Guards against a search that silently finds nothing, and so tests nothing."""
    names = {cls.__name__ for cls in found(VisionEncoder)}
    assert {"Llama4Vision", "MetaCLIP", "MllamaVision", "Patches"} <= names


@every_encoder
def test_shapes_and_dtype(cls: type[VisionEncoder]) -> None:
    """Guards against features that are not [N, summaries + grid * grid, width] in its dtype."""
    encoder = build(cls)
    for dtype in (torch.float32, torch.bfloat16):
        encoder.to(dtype)
        features = encoder(encoder.normalize(tiles(encoder, 3)))
        assert features.shape == (3, encoder.summary_tokens + encoder.grid**2, encoder.width)
        assert features.dtype == dtype
        assert features.isfinite().all()


@every_encoder
def test_normalize(cls: type[VisionEncoder]) -> None:
    """Guards against preprocessing with another encoder's mean and standard deviation."""
    encoder = build(cls)
    white = torch.full_like(tiles(encoder, 1), 255)
    for channel in range(3):
        expected = (1 - encoder.mean[channel]) / encoder.std[channel]
        got = encoder.normalize(white)[0, channel]
        torch.testing.assert_close(got, torch.full_like(got, expected))


@every_encoder
def test_tiles_of_another_size_are_refused(cls: type[VisionEncoder]) -> None:
    """Guards against a size mix-up that surfaces deep inside as a shape error, or not at all."""
    encoder = build(cls)
    size = encoder.tile_size * 2
    with pytest.raises(ValueError, match=f"{encoder.tile_size}.*got .*{size}"):
        encoder.normalize(torch.zeros(1, 3, size, size, dtype=torch.uint8))


@every_encoder
def test_features_are_row_major(cls: type[VisionEncoder]) -> None:
    """Guards against transposed grids: repainting a patch must change its own feature most."""
    encoder = build(cls).eval()
    count, side = encoder.grid**2, encoder.tile_size // encoder.grid
    clean = encoder.normalize(tiles(encoder, 1))
    painted = clean.repeat(count, 1, 1, 1)
    for place in range(count):
        y, x = (side * i for i in divmod(place, encoder.grid))
        painted[place, :, y : y + side, x : x + side] *= -1
    with torch.no_grad():
        change = (encoder(painted) - encoder(clean))[:, encoder.summary_tokens :].norm(dim=2)
    assert change.argmax(dim=1).tolist() == list(range(count))


@every_encoder
def test_gradients_reach_every_parameter(cls: type[VisionEncoder]) -> None:
    """Guards against weights that nothing uses, and against detached or frozen branches."""
    encoder = build(cls)
    features = encoder(encoder.normalize(tiles(encoder, 4)))
    (features * torch.randn_like(features)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_encoder
def test_summary_is_one_feature_of_each_tile(cls: type[VisionEncoder]) -> None:
    """Guards against summaries that mix tiles, or are left over from other weights' gradients."""
    encoder = build(cls).eval()
    pixels = encoder.normalize(tiles(encoder, 3))
    summary = encoder.summary(pixels)
    assert summary.shape == (3, encoder.width)
    alone = torch.cat([encoder.summary(tile[None]) for tile in pixels])
    torch.testing.assert_close(summary, alone, rtol=1e-5, atol=1e-5)
    encoder.zero_grad()
    (summary * torch.randn_like(summary)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@every_encoder
@pytest.mark.parametrize("factor", [2, 0.5])
def test_weights_fit_another_tile_size(cls: type[VisionEncoder], factor: float) -> None:
    """Guards against a forgotten table of positions, and one resized in the wrong order of rows."""
    encoder = build(cls)
    size = int(factor * encoder.tile_size)
    other = cls(**{**encoder.init_args, "tile_size": size})
    state = encoder.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    adapted = other.adapt(state)
    other.load_state_dict(adapted)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert other(other.normalize(tiles(other, 1))).isfinite().all()

    same = encoder.adapt(state)
    assert state.keys() == same.keys() == adapted.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not encoder.adapt({})  # a part of an encoder is adapted as far as it goes


@every_encoder
def test_same_seed_same_features(cls: type[VisionEncoder]) -> None:
    """Guards against randomness outside the seed, in building or in (training-mode) running."""
    first, second = build(cls), build(cls)
    pixels = first.normalize(tiles(first, 2))
    assert torch.equal(first(pixels), first(pixels))
    assert torch.equal(first(pixels), second(pixels))


@every_encoder
def test_tiles_do_not_see_each_other(cls: type[VisionEncoder]) -> None:
    """Guards against mixing over the batch (batch norm, a wrong reshape)."""
    encoder = build(cls).eval()
    pixels = encoder.normalize(tiles(encoder, 3))
    together = encoder(pixels)
    alone = torch.cat([encoder(tile[None]) for tile in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@every_encoder
def test_rebuilt_from_init_args(cls: type[VisionEncoder]) -> None:
    """Guards against checkpoints that cannot be rebuilt from their description, kept as JSON."""
    encoder = build(cls)
    rebuilt = cls(**json.loads(json.dumps(encoder.init_args)))
    rebuilt.load_state_dict(encoder.state_dict())
    pixels = encoder.normalize(tiles(encoder, 1))
    assert torch.equal(rebuilt(pixels), encoder(pixels))
    assert (rebuilt.mean, rebuilt.std) == (encoder.mean, encoder.std)


@every_encoder
def test_copies_keep_init_args(cls: type[VisionEncoder]) -> None:
    """Guards against copies (EMA, worker processes) that forget how they were built."""
    encoder = build(cls)
    assert deepcopy(encoder).init_args == encoder.init_args


def test_init_args_hold_defaults() -> None:
    """Guards against old checkpoints that change their meaning when a default changes."""
    assert Patches(32, width=12).init_args == {"tile_size": 32, "patch_size": 8, "width": 12}


def test_patches_see_themselves_alone() -> None:
    """Guards the encoder-free arm: a patch that looks at another is an encoder after all."""
    encoder = Patches(tile_size=16, patch_size=4, width=12)
    pixels = encoder.normalize(tiles(encoder, 1)).requires_grad_()
    encoder(pixels)[0, 6].square().sum().backward()  # row 1, column 2 of a 4 x 4 grid
    touched = pixels.grad[0].abs().sum(0) > 0
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(touched, expected)


def test_patches_tell_places_apart() -> None:
    """Guards against positions lost to a broadcast: a blank tile has a feature for each place."""
    encoder = Patches(tile_size=16, patch_size=4, width=12)
    features = encoder(torch.zeros(1, 3, 16, 16))[0]
    assert len(features.unique(dim=0)) == 16


def test_patches_must_tile_the_tile() -> None:
    """Guards against pixels dropped at the right and bottom edge."""
    with pytest.raises(ValueError, match=r"30.*must divide by.*8.*6 pixels"):
        Patches(tile_size=30, patch_size=8)
