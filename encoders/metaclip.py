"""MetaCLIP towers through open_clip: pretrained ones, and smaller ones of the same kind.

MetaCLIP (arXiv 2309.16671) is CLIP's architecture on curated data. open_clip is imported when a
tower is built, never when this file is: that takes seconds, and needs a matching torchvision.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from encoders.base import VisionEncoder

MEAN = (0.48145466, 0.4578275, 0.40821073)  # open_clip's OPENAI_DATASET_MEAN and _STD: CLIP's own
STD = (0.26862954, 0.26130258, 0.27577711)
QUICK = "-quickgelu"  # ends open_clip's names of models whose activation is QuickGELU


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

    The class token stays in the sequence, since patches attend to it, but is not returned; CLIP's
    projection to the space shared with text reads the class token alone, and is left out.

    Sizes left None are those of ``model``, so a pretrained tower and a toy of its kind are::

        MetaCLIP(model="ViT-B-16-quickgelu", pretrained="metaclip_fullcc")
        MetaCLIP(tile_size=64, patch_size=8, width=96, layers=2, heads=3)

    Args:
        model: a name of open_clip's (``open_clip.list_models()``). It settles the activation:
            MetaCLIP 1 was trained with QuickGELU, so its names end in ``-quickgelu``; of its tags
            only ``metaclip_altogether`` wants plain GELU.
        pretrained: a tag of open_clip's for this model (downloaded once), or the file of a CLIP
            checkpoint; None draws random weights. A file says nothing of activation and heads:
            there ``model`` and ``heads`` are taken at their word.
        tile_size: S, pixels a side of a tile.
        patch_size: pixels a side of a patch.
        width: V, features per patch.
        layers: transformer blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``width``.

    Raises:
        ValueError: the model is unknown or no plain vision transformer, the sizes do not fit each
            other or the checkpoint, or model and tag differ in activation.
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
        file = None if pretrained is None else Path(pretrained)
        if file and not file.is_file():
            if tower != named:
                raise ValueError(
                    f"{pretrained!r} is no file, and a tag's tower has the sizes of its model "
                    f"({named}): correct the path, or leave the sizes out"
                )
            file = _download(model, str(file), tower.quick_gelu)

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
        if file:
            self._load(file)
        # Whoever rebuilds this encoder brings its weights along, and needs no second download.
        sizes = asdict(tower)
        del sizes["quick_gelu"]
        self.init_args |= {"pretrained": None, **sizes}

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalised tiles ``[N, 3, S, S]`` to ``[N, P, V]``, row-major."""
        _, patches = self.visual(tiles)
        return patches

    def _load(self, file: Path) -> None:
        from open_clip.factory import load_state_dict

        weights = load_state_dict(str(file), weights_only=True)
        tower = {
            key: value
            for key, value in weights.items()
            if key.startswith("visual.") and key != "visual.proj"
        }
        try:
            self.load_state_dict(tower)
        except RuntimeError as error:
            raise ValueError(
                f"{file} holds no CLIP tower of these sizes; tile_size, patch_size, width, layers "
                f"and mlp_ratio must be the checkpoint's (positions are not interpolated): {error}"
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


def _download(model: str, tag: str, quick_gelu: bool) -> Path:
    """The checkpoint of a pretrained tag, from open_clip's cache or the network.

    Raises:
        ValueError: there is no such tag, or its preprocessing or activation are not this model's.
    """
    import open_clip

    base = model.removesuffix(QUICK)
    # Tags that do not use QuickGELU are listed under the base name alone.
    source = open_clip.get_pretrained_cfg(model, tag) or open_clip.get_pretrained_cfg(base, tag)
    if not source:
        tags = sorted(open_clip.list_pretrained_tags_by_model(base))
        raise ValueError(f"{tag!r} is no file and no tag of {model!r}, whose tags are {tags}")
    trained_with_quick_gelu = bool(source.get("quick_gelu"))
    if trained_with_quick_gelu != quick_gelu:
        raise ValueError(
            f"the tag {tag!r} was trained with "
            f"{'QuickGELU' if trained_with_quick_gelu else 'plain GELU'}, but {model!r} has the "
            f"other activation: every feature would be slightly wrong. "
            f"Use model={base + QUICK * trained_with_quick_gelu!r}"
        )
    if (source["mean"], source["std"]) != (MEAN, STD):
        raise ValueError(f"the tag {tag!r} was not trained with CLIP's preprocessing")
    return Path(open_clip.download_pretrained(source))
