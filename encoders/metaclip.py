"""MetaCLIP towers through open_clip: pretrained ones, and smaller ones of the same kind.

MetaCLIP (arXiv 2309.16671) is CLIP's architecture on curated data. open_clip is imported when a
tower is built, never when this file is: that takes seconds, and needs a matching torchvision.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from encoders.base import VisionEncoder
from encoders.positions import resize_positions

MEAN = (0.48145466, 0.4578275, 0.40821073)  # open_clip's OPENAI_DATASET_MEAN and _STD: CLIP's own
STD = (0.26862954, 0.26130258, 0.27577711)
QUICK = "-quickgelu"  # ends open_clip's names of models whose activation is QuickGELU
DESCRIPTION = "open_clip_config.json"  # what open_clip's ``save_for_hf`` writes beside weights


@dataclass(frozen=True)
class Tower:
    """The shape of a CLIP vision transformer: sizes as in the arguments of ``MetaCLIP``.

    Raises:
        ValueError: the tile does not divide into patches, or the width into heads.
    """

    tile_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    quick_gelu: bool

    def __post_init__(self) -> None:
        for whole, part in (("tile_size", "patch_size"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} ({getattr(self, whole)}) must divide by "
                    f"{part} ({getattr(self, part)})"
                )


class MetaCLIP(VisionEncoder):
    """A CLIP vision transformer that gives its patch tokens, after the last layer and its norm.

    The class token stays in the sequence, since patches attend to it, but is returned by
    ``summary`` alone; CLIP's projection to the space shared with text is left out.

    Sizes left None are those of ``model``, so a pretrained tower, the same tower for larger tiles,
    and a toy of its kind are::

        MetaCLIP(model="ViT-B-16-quickgelu", pretrained="metaclip_fullcc")
        MetaCLIP(model="ViT-B-16-quickgelu", pretrained="metaclip_fullcc", tile_size=448)
        MetaCLIP(tile_size=64, patch_size=8, width=96, layers=2, heads=3)

    At another tile size than the checkpoint's, its positions are interpolated (``adapt``). That
    keeps a tower usable, not as good as one trained on: fine-tune it.

    Args:
        model: a name of open_clip's (``open_clip.list_models()``). It settles the activation:
            MetaCLIP 1 was trained with QuickGELU, so its names end in ``-quickgelu``; of its tags
            only ``metaclip_altogether`` wants plain GELU.
        pretrained: a tag of open_clip's for this model (downloaded once), or the file of a CLIP
            checkpoint; None draws random weights. Weights do not show activation, heads and
            preprocessing: they must be those of the tag, of an ``open_clip_config.json`` beside
            the file, or of the tag whose file has this name. Where there is none of these,
            ``model`` and ``heads`` are taken at their word.
        tile_size: S, pixels a side of a tile; any multiple of ``patch_size``.
        patch_size: pixels a side of a patch.
        width: V, features per patch.
        layers: transformer blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``width``.
        position_std: standard deviation of the positions that random weights start with. None
            takes CLIP's ``width ** -0.5``: at a width of 96, a tenth of what a white patch gives
            (experiments/LOG.md has what that costs).

    Raises:
        ValueError: the model is unknown or no plain vision transformer, the sizes do not fit each
            other or the checkpoint, the weights were trained with another activation, other heads
            or other preprocessing, or both ``pretrained`` and ``position_std`` are given.
    """

    def __init__(
        self,
        model: str = "ViT-B-16-quickgelu",
        pretrained: str | None = None,
        tile_size: int | None = None,
        patch_size: int | None = None,
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        mlp_ratio: float | None = None,
        position_std: float | None = None,
    ) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, VisionTransformer

        named = _named(model)
        given: dict[str, Any] = {
            "tile_size": tile_size,
            "patch_size": patch_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
        }
        tower = replace(named, **{key: size for key, size in given.items() if size is not None})
        if pretrained and position_std is not None:
            raise ValueError("position_std is for random weights, and pretrained ones are given")
        file = None if pretrained is None else Path(pretrained)
        if file and file.is_file():
            for source, facts in _known_of(file):
                _require(source, facts, model, tower)
        elif file:
            if replace(tower, tile_size=named.tile_size) != named:
                raise ValueError(
                    f"{pretrained!r} is no file, and a tag's tower has the sizes of its model "
                    f"({named}): correct the path, or leave the sizes out (but for tile_size)"
                )
            file = _download(model, str(file), tower)

        self.width = tower.width
        self.grid = tower.tile_size // tower.patch_size
        self.tile_size = tower.tile_size
        self.mean, self.std = MEAN, STD

        # Named as in CLIP's checkpoints, whose keys then fit without a translation.
        self.visual = VisionTransformer(
            image_size=tower.tile_size,
            patch_size=tower.patch_size,
            width=tower.width,
            layers=tower.layers,
            heads=tower.heads,
            mlp_ratio=tower.mlp_ratio,
            act_layer=QuickGELU if tower.quick_gelu else nn.GELU,
            output_tokens=True,
        )
        self.visual.proj = None
        if position_std is not None:
            nn.init.normal_(self.visual.positional_embedding, std=position_std)
        if file:
            self._load(file)
        # Whoever rebuilds this encoder brings its weights along, and needs no second download.
        sizes = asdict(tower)
        del sizes["quick_gelu"]
        self.init_args |= {"pretrained": None, **sizes}
        del self.init_args["position_std"]

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalised tiles ``[N, 3, S, S]`` to ``[N, P, V]``, row-major."""
        _, patches = self.visual(tiles)
        return patches

    def summary(self, tiles: Tensor) -> Tensor:
        """The class token of each normalised tile after the last norm, ``[N, V]``."""
        token, _ = self.visual(tiles)
        return token

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize ``visual.positional_embedding [1 + G * G, V]``, the class token's row first."""
        adapted, key = dict(state), "visual.positional_embedding"
        if key in state:
            adapted[key] = resize_positions(state[key], self.grid, first=1)
        return adapted

    def _load(self, file: Path) -> None:
        from open_clip.factory import load_state_dict

        weights = load_state_dict(str(file), weights_only=True)
        tower = {
            key: value
            for key, value in weights.items()
            if key.startswith("visual.") and key != "visual.proj"
        }
        try:
            self.load_state_dict(self.adapt(tower))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{file} holds no CLIP tower of these sizes; patch_size, width, layers and "
                f"mlp_ratio must be the checkpoint's: {error}"
            ) from error


def _named(model: str) -> Tower:
    """The tower of a model of open_clip's.

    Raises:
        ValueError: open_clip has no such model, or its tower is no plain vision transformer.
    """
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(f"open_clip has no model {model!r}; see open_clip.list_models()")
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    plain = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"}
    if not config["vision_cfg"].keys() <= plain or not isinstance(vision.layers, int):
        raise ValueError(
            f"the tower of {model!r} is no plain vision transformer; MetaCLIP's are "
            f"ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14 and ViT-bigG-14, with {QUICK!r} behind"
        )
    return Tower(
        tile_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        quick_gelu=bool(config.get("quick_gelu")),
    )


def _known_of(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is known of the weights in a file, and from where, for ``_require``."""
    import open_clip

    description = file.with_name(DESCRIPTION)
    if description.is_file():
        content = json.loads(description.read_text())
        yield str(description), {**content["model_cfg"], **content["preprocess_cfg"]}
    for pair in open_clip.list_pretrained():
        source = open_clip.get_pretrained_cfg(*pair)
        if "/metaclip/" in source["url"] and source["url"].endswith(f"/{file.name}"):
            yield f"{file} (by its name the tag {pair[1]!r})", source


def _require(source: str, facts: Mapping[str, Any], model: str, tower: Tower) -> None:
    """Refuse a tower unlike the trained one in what no weight shows.

    Args:
        source: where the facts come from.
        facts: in open_clip's terms: ``quick_gelu``, ``mean`` and ``std`` of the preprocessing, and
            ``vision_cfg`` where it is known. What is left out is open_clip's default.
        model: the model asked for.
        tower: its tower, perhaps of other sizes.

    Raises:
        ValueError: activation, preprocessing or heads differ.
    """
    trained_with_quick_gelu = bool(facts.get("quick_gelu"))
    if trained_with_quick_gelu != tower.quick_gelu:
        cure = model.removesuffix(QUICK) + QUICK * trained_with_quick_gelu
        raise ValueError(
            f"{source}: trained with "
            f"{'QuickGELU' if trained_with_quick_gelu else 'plain GELU'}, but {model!r} has the "
            f"other activation: every feature would be slightly wrong. Use model={cure!r}"
        )
    if tuple(facts.get("mean", MEAN)) != MEAN or tuple(facts.get("std", STD)) != STD:
        raise ValueError(f"{source}: not trained with CLIP's preprocessing, which this tower has")
    if "vision_cfg" in facts:
        head_width = facts["vision_cfg"].get("head_width", 64)
        if tower.width != tower.heads * head_width:
            raise ValueError(
                f"{source}: its heads are {head_width} wide, but width {tower.width} in "
                f"{tower.heads} heads makes {tower.width // tower.heads}: correct heads"
            )


def _download(model: str, tag: str, tower: Tower) -> Path:
    """The checkpoint of a pretrained tag, from open_clip's cache or the network.

    Raises:
        ValueError: there is no such tag, or its preprocessing or activation are not the tower's.
    """
    import open_clip

    base = model.removesuffix(QUICK)
    # Tags that do not use QuickGELU are listed under the base name alone.
    source = open_clip.get_pretrained_cfg(model, tag) or open_clip.get_pretrained_cfg(base, tag)
    if not source:
        tags = sorted(open_clip.list_pretrained_tags_by_model(base))
        raise ValueError(f"{tag!r} is no file and no tag of {model!r}, whose tags are {tags}")
    _require(f"the tag {tag!r}", source, model, tower)
    return Path(open_clip.download_pretrained(source))
