"""MetaCLIP towers against open_clip's own, without a download."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from torch import nn

from encoders.metaclip import MEAN, STD, MetaCLIP

SIZES = {"tile_size": 32, "patch_size": 8, "width": 24, "layers": 3, "heads": 3}


def clip(quick_gelu: bool = True) -> open_clip.CLIP:
    """A whole CLIP of random weights, its tower as ``SIZES`` say."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(
        12,
        open_clip.CLIPVisionCfg(**vision),
        open_clip.CLIPTextCfg(**text),
        quick_gelu=quick_gelu,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # no ones, no zeros: every weight must matter
            parameter.normal_(std=0.3)
    return model.eval()


def reference(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features of the last layer by open_clip's feature interface, ``[N, P, V]``."""
    out = tower.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, output_fmt="NLC", intermediates_only=True
    )
    return out["image_intermediates"][-1]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("container", ["safetensors", "pt", "training"])
def test_features_of_a_local_checkpoint(tmp_path: Path, quick_gelu: bool, container: str) -> None:
    """Guards against skipped weights, a wrong activation, and features that hold the class token.

    The containers are those of open_clip: bare weights, and a training checkpoint of a model
    wrapped for several GPUs.
    """
    model = clip(quick_gelu)
    path = tmp_path / f"clip.{container}"
    if container == "safetensors":
        save_file(model.state_dict(), path)
    elif container == "pt":
        torch.save(model.state_dict(), path)
    else:
        wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": wrapped}, path)
    name = "ViT-B-16-quickgelu" if quick_gelu else "ViT-B-16"
    encoder = MetaCLIP(model=name, pretrained=str(path), **SIZES).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels), reference(model.visual, pixels), rtol=0, atol=1e-6
        )
        pooled = encoder.summary(pixels) @ model.visual.proj
        torch.testing.assert_close(pooled, model.encode_image(pixels), rtol=0, atol=1e-5)


def test_activation_follows_the_model() -> None:
    """Guards against QuickGELU and GELU being taken for the same thing: they are close, not equal.

    Seen at MetaCLIP #79 and open_clip #970.
    """
    quick, plain = (MetaCLIP(model=name, **SIZES) for name in ("ViT-B-16-quickgelu", "ViT-B-16"))
    plain.load_state_dict(quick.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    gap = (quick(pixels) - plain(pixels)).abs().max()
    assert 1e-4 < gap < 1e-1


@pytest.mark.parametrize(
    ("model", "tag", "cure"),
    [
        ("ViT-B-16", "metaclip_fullcc", "ViT-B-16-quickgelu"),
        ("ViT-L-14", "metaclip_400m", "ViT-L-14-quickgelu"),
        ("ViT-H-14-quickgelu", "metaclip_altogether", "ViT-H-14"),
    ],
)
def test_a_tag_of_another_activation_is_refused(model: str, tag: str, cure: str) -> None:
    """Guards against open_clip's mere warning: the wrong activation costs accuracy silently."""
    with pytest.raises(ValueError, match=f"Use model='{cure}'"):
        MetaCLIP(model=model, pretrained=tag)


@pytest.mark.parametrize(
    "pair",
    [
        ("ViT-B-16-quickgelu", "metaclip_fullcc"),
        ("ViT-bigG-14-quickgelu", "metaclip_fullcc"),
        ("ViT-H-14", "metaclip_altogether"),
    ],
)
def test_a_fitting_tag_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]
) -> None:
    """Guards against refusing the right pairs, and against preprocessing unlike the tag's."""
    asked = []

    def download(source: dict[str, object]) -> str:
        asked.append(source)
        raise ConnectionError

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    with pytest.raises(ConnectionError):
        MetaCLIP(*pair)
    assert "metaclip" in asked[0]["url"]
    assert (asked[0]["mean"], asked[0]["std"]) == (MEAN, STD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-Z-99"}, "no model 'ViT-Z-99'"),
        ({"model": "RN50"}, "no plain vision transformer.*ViT-B-16"),
        ({"pretrained": "metaclip_fulcc"}, "no file and no tag.*metaclip_fullcc"),
        ({"model": "ViT-L-14", "pretrained": "laion2b_s32b_b82k"}, "preprocessing"),
        ({"pretrained": "metaclip_fullcc", "layers": 2}, "leave the sizes out"),
        ({"tile_size": 100}, "tile_size .100. must divide by patch_size .16."),
        ({"heads": 5}, "width .768. must divide by heads .5."),
        ({"pretrained": "metaclip_fullcc", "position_std": 1.0}, "for random weights"),
    ],
)
def test_wrong_arguments_name_the_cure(arguments: dict[str, object], message: str) -> None:
    """Guards against a failure deep inside open_clip that does not say what to change."""
    with pytest.raises(ValueError, match=message):
        MetaCLIP(**arguments)


@pytest.mark.parametrize(("size", "value"), [("patch_size", 16), ("width", 48), ("layers", 2)])
def test_a_checkpoint_of_other_sizes_is_refused(tmp_path: Path, size: str, value: int) -> None:
    """Guards against partly loaded towers."""
    torch.save(clip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip.pt holds no CLIP tower of these sizes"):
        MetaCLIP(pretrained=str(tmp_path / "clip.pt"), **(SIZES | {size: value}))


def test_a_checkpoint_fits_other_tiles(tmp_path: Path) -> None:
    """Guards against positions resized otherwise than by open_clip, whose own tower is the oracle.

    A tag does the same; its other sizes cannot be chosen.
    """
    model = clip()
    state = model.state_dict()
    torch.save(state, tmp_path / "clip.pt")
    encoder = MetaCLIP(pretrained=str(tmp_path / "clip.pt"), **(SIZES | {"tile_size": 64})).eval()
    assert encoder.grid == 8

    vision = {"image_size": 64, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    larger = open_clip.CLIP(
        12, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu=True
    ).eval()
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels), reference(larger.visual, pixels), rtol=0, atol=1e-6
        )


def test_a_tag_fits_other_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against a tile size that a tag refuses, like the sizes that it does fix."""
    torch.save({"visual.positional_embedding": torch.randn(197, 768)}, tmp_path / "b16.pt")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: tmp_path / "b16.pt")
    monkeypatch.setattr(
        MetaCLIP, "load_state_dict", lambda self, state: shapes.extend(map(len, state.values()))
    )
    shapes: list[int] = []
    with torch.device("meta"):
        encoder = MetaCLIP("ViT-B-16-quickgelu", "metaclip_fullcc", tile_size=448)
    assert (encoder.grid, shapes) == (28, [1 + 28**2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, None),
        ({"quick_gelu": False}, "plain GELU.*Use model='ViT-B-16'"),
        ({"mean": (0.5, 0.5, 0.5)}, "preprocessing"),
        ({"std": (0.5, 0.5, 0.5)}, "preprocessing"),
        ({"head_width": 12}, "12 wide.*correct heads"),
    ],
)
def test_a_description_beside_the_file_is_believed(
    tmp_path: Path, given: dict[str, Any], message: str | None
) -> None:
    """Guards against features slightly wrong where the files say how they would be right.

    open_clip writes the description itself, as it does for the Hugging Face hub.
    """
    vision = {"width": 24, "head_width": given.get("head_width", 8)}
    model = clip()
    model.visual.image_mean = given.get("mean", MEAN)
    model.visual.image_std = given.get("std", STD)
    save_config_for_hf(
        model,
        tmp_path / "open_clip_config.json",
        {"quick_gelu": given.get("quick_gelu", True), "vision_cfg": vision},
    )
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    arguments = {"pretrained": str(tmp_path / "open_clip_model.safetensors"), **SIZES}
    if message is None:
        MetaCLIP(**arguments)
    else:
        with pytest.raises(ValueError, match=f"open_clip_config.json: .*{message}"):
            MetaCLIP(**arguments)


@pytest.mark.parametrize(
    ("name", "model", "cure"),
    [
        ("b16_fullcc2.5b.pt", "ViT-B-16", "ViT-B-16-quickgelu"),
        ("h14_v1.2_altogether.pt", "ViT-H-14-quickgelu", "ViT-H-14"),
    ],
)
def test_a_released_file_is_known_by_its_name(
    tmp_path: Path, name: str, model: str, cure: str
) -> None:
    """Guards against a file fetched by hand that loses the check which its tag would have had."""
    torch.save(clip().state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=f"by its name the tag .*Use model='{cure}'"):
        MetaCLIP(model=model, pretrained=str(tmp_path / name), **SIZES)
    MetaCLIP(model=cure, pretrained=str(tmp_path / name), **SIZES)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Guards against unpickling whatever a downloaded file holds."""
    torch.save({"visual.hook": Path.cwd}, tmp_path / "clip.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        MetaCLIP(pretrained=str(tmp_path / "clip.pt"), **SIZES)


def test_rebuilding_needs_no_pretrained_file(tmp_path: Path) -> None:
    """Guards against checkpoints that open only where the pretrained weights still lie."""
    path = tmp_path / "clip.pt"
    torch.save(clip().state_dict(), path)
    encoder = MetaCLIP(pretrained=str(path), **SIZES)
    path.unlink()
    rebuilt = MetaCLIP(**encoder.init_args)
    rebuilt.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(rebuilt(pixels), encoder(pixels))


def test_positions_start_at_the_given_scale() -> None:
    """Guards against an option that changes nothing: positions are drawn before it is read.

    And against a checkpoint that begins no other run, because its tower started otherwise.
    """
    positions = [
        MetaCLIP(**SIZES, position_std=std).visual.positional_embedding for std in (None, 1.0)
    ]
    assert positions[0].std().item() == pytest.approx(24**-0.5, rel=0.2)
    assert positions[1].std().item() == pytest.approx(1.0, rel=0.2)
    assert MetaCLIP(**SIZES, position_std=1.0).init_args == MetaCLIP(**SIZES).init_args


def test_sizes_of_the_model_are_recorded() -> None:
    """Guards against checkpoints whose sizes hang on the installed version of open_clip."""
    with torch.device("meta"):
        encoder = MetaCLIP()
    assert encoder.init_args == {
        "model": "ViT-B-16-quickgelu",
        "pretrained": None,
        "tile_size": 224,
        "patch_size": 16,
        "width": 768,
        "layers": 12,
        "heads": 12,
        "mlp_ratio": 4.0,
    }


def test_importing_the_file_does_not_import_open_clip() -> None:
    """Guards the start-up time of everything that only looks the class up."""
    code = "import sys, encoders.metaclip; sys.exit('open_clip' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_features_of_the_real_architecture(tmp_path: Path, name: str) -> None:
    """Guards against a tower that equals open_clip's at toy sizes only (heads, norms, depth)."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False).eval()
    save = save_file if name.endswith("safetensors") else torch.save
    save(model.state_dict(), tmp_path / name)
    encoder = MetaCLIP("ViT-B-16-quickgelu", str(tmp_path / name)).eval()
    pixels = torch.randn(2, 3, 224, 224)
    model.visual.output_tokens, model.visual.proj = True, None
    with torch.no_grad():
        token, patches = model.visual(pixels)
        torch.testing.assert_close(encoder(pixels), patches, rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.summary(pixels), token, rtol=0, atol=1e-6)
        torch.testing.assert_close(patches, reference(model.visual, pixels), rtol=0, atol=1e-6)
    assert token.shape == (2, 768)
    assert patches.shape == (2, 196, 768)
