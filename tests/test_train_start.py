"""Weights to start from: whole checkpoints and parts of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import load_model, save_model
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer
from sandbox.train.start import start_from


def model(seed: int, *, sees: bool = True, patch: int = 8, **config: Any) -> VisionLanguageModel:
    """A small model of random weights."""
    torch.manual_seed(seed)
    backbone = BackboneConfig(
        **{"width": 32, "layers": 2, "heads": 2, "head_dim": 16, "expert_hidden": 16, **config}
    )
    encoder = Patches(tile_size=32, patch_size=patch, width=24) if sees else None
    fusion = EarlyFusion if sees else None
    return VisionLanguageModel(encoder, fusion, backbone, Tokenizer.load("small"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of ``model(1)``."""
    path = tmp_path / "other.safetensors"
    save_model(model(1), path)
    return path


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two parts hold the same numbers."""
    theirs = other.state_dict()
    return all(tensor.equal(theirs[name]) for name, tensor in one.state_dict().items())


def test_parts_come_from_where_they_were_said_to(saved: Path):
    """Guards against a part that silently keeps its random weights, or brings another along."""
    fresh, start, other = model(2), model(2), model(1)
    start_from(start, {"encoder": str(saved), "backbone": str(saved)})
    assert same(start.encoder, other.encoder)
    assert same(start.backbone, other.backbone)
    assert same(start.fusion, fresh.fusion)


def test_a_language_model_can_lend_its_backbone(tmp_path: Path):
    """Guards against a check of the whole model, where one part is wanted."""
    path = tmp_path / "lm.safetensors"
    save_model(model(3, sees=False), path)
    start = model(2)
    start_from(start, {"backbone": str(path)})
    assert same(start.backbone, model(3, sees=False).backbone)


def test_a_whole_checkpoint_fills_the_whole_model(saved: Path):
    """Guards against a string that is taken for a part."""
    start = model(2)
    start_from(start, str(saved))
    assert same(start, model(1))


@pytest.mark.parametrize(
    ("start", "part", "message"),
    [
        ({"patch": 16}, "encoder", r"patch_size is 8 there, 16 here"),
        ({"rope_theta": 10.0}, "backbone", r"rope_theta is 500000.0 there, 10.0 here"),
        ({}, "encodr", r"no part 'encodr' \(parts: encoder, fusion, backbone\)"),
        ({"sees": False}, "encoder", r"no part 'encoder' \(parts: backbone\)"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, start: dict[str, Any], part: str, message: str):
    """Guards against weights of the right shape in a part that computes something else."""
    mine = model(2, **start)
    with pytest.raises(UserError, match=message):
        start_from(mine, {part: str(saved)})
    assert same(mine, model(2, **start)), "nothing was taken over"


def test_a_checkpoint_older_than_an_argument_has_its_default(tmp_path: Path):
    """Guards against old runs that no longer load, or are taken for another configuration."""
    path = tmp_path / "old.safetensors"
    old = model(1)
    del old.fusion.init_args["bidirectional"]
    save_model(old, path)
    assert load_model(path).fusion.bidirectional is False
    start = model(2)
    start_from(start, {"fusion": str(path)})
    assert same(start.fusion, old.fusion)
    other = model(2)
    other.fusion = EarlyFusion(**{**other.fusion.init_args, "bidirectional": True})
    with pytest.raises(UserError, match=r"init_args\.bidirectional is False there, True here"):
        start_from(other, {"fusion": str(path)})


def test_a_checkpoint_without_the_part_says_what_it_has(tmp_path: Path):
    """Guards against a KeyError about a tensor's name."""
    path = tmp_path / "lm.safetensors"
    save_model(model(3, sees=False), path)
    with pytest.raises(UserError, match=r"holds no encoder \(it has: backbone\)"):
        start_from(model(2), {"encoder": str(path)})
