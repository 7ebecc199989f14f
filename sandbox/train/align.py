"""Alignment: an encoder learns, through a frozen language model, to say what that model reads.

Llama 4's encoder is "based on MetaCLIP but trained separately in conjunction with a frozen Llama
model" (Meta AI, The Llama 4 herd, 2025). The loss is the language model's own: next-token
cross-entropy of captions and answers. Its gradient passes through every layer of the model down to
the image tokens, and no weight or buffer of the model moves.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.base import VisionEncoder
from sandbox.data.batch import Batch
from sandbox.errors import UserError
from sandbox.model import FusionBuilder, Output, VisionLanguageModel
from sandbox.train.next_token import NextToken
from sandbox.train.objective import submodule
from sandbox.train.optim import OptimizerConfig
from sandbox.train.start import load_reader, start_from


class Align(NextToken):
    """Trains encoder and fusion against a frozen language model.

    Args:
        language_model: checkpoint or run of ours, or directory of a transformers checkpoint. The
            model has its backbone, its tokenizer and its weights from there.
        encoder: pixels to patch features.
        fusion: class path and arguments of the fusion; the model supplies the widths.
        max_tiles: tiles that an image is cut into at most, the global one not counted.
        optimizer: how parameters move.
        init_from: by part (``encoder``, ``fusion``), a checkpoint or run to start it from.
        train_only: dotted names of the parts that learn; None trains encoder and fusion whole.
            ``[fusion]`` trains the projector alone; with ``encoder.visual.transformer.resblocks.1``
            beside it, the second block of a MetaCLIP tower, too.
        contrastive: weight of the auxiliary loss, see ``CaptionContrast``. It needs captions in
            the data (``sandbox.data.words.Described``). 0 leaves it out. It contrasts one batch of
            one process: of accumulated batches each by itself, and several processes are refused.

    Raises:
        UserError: a checkpoint is missing or does not fit, or ``train_only`` names no part of
            encoder or fusion.
    """

    def __init__(
        self,
        language_model: str,
        encoder: VisionEncoder,
        fusion: FusionBuilder,
        max_tiles: int = 1,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen, so safe to share)
        init_from: dict[str, str] | None = None,
        train_only: Sequence[str] | None = None,
        contrastive: float = 0.0,
        compile: bool = False,
    ) -> None:
        reader = load_reader(language_model)
        config = reader.backbone.config
        model = VisionLanguageModel(encoder, fusion, config, reader.tokenizer, max_tiles=max_tiles)
        model.backbone = reader.backbone
        start_from(model, init_from)
        if train_only is not None:
            model.requires_grad_(False)
            for name in train_only:
                if not name.startswith(("encoder", "fusion")):
                    raise UserError(f"train_only: '{name}' is no part of encoder or fusion")
                submodule(model, name, key="train_only").requires_grad_(True)
        super().__init__(model, optimizer, freeze=["backbone"], compile=compile)
        self.contrastive = contrastive
        self.contrast = CaptionContrast(model) if contrastive else None

    def setup(self, stage: str) -> None:
        """Refuse what would be another loss on several processes.

        Raises:
            UserError: the contrastive loss is on, and they are several.
        """
        if stage == "fit" and self.contrast is not None and self.trainer.world_size > 1:
            raise UserError(
                f"contrastive={self.contrastive} with {self.trainer.world_size} processes: each "
                "would contrast its own captions alone; set trainer.devices to 1, or contrastive "
                "to 0"
            )

    def train(self, mode: bool = True) -> "Align":
        """Switch encoder and fusion; the language model stays in eval mode."""
        super().train(mode)
        self.model.backbone.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        """The model's output; its loss holds the auxiliary one, too."""
        if self.contrast is None:
            return self.model(batch, labelled_only=True)
        features = self.model.features(batch)
        output: Output = self.model(batch, features=features, labelled_only=True)
        if features is None or (found := _captions(batch)) is None:
            raise UserError(
                f"{batch.name}: the contrastive loss needs images with captions; set the task to "
                "sandbox.data.words.Described around yours, or contrastive to 0"
            )
        part = self.contrast(self.model, features, batch.tile_rows, *found)
        loss = output.loss + self.contrastive * part
        return replace(output, loss=loss, parts=output.parts | {"contrastive": part})


class CaptionContrast(nn.Module):
    """Images and captions find each other among a batch's (CLIP, arXiv 2103.00020, figure 3).

    A caption is what the frozen language model makes of it: its last token's hidden state. An
    image is the mean of its patch features. Both are projected to one space by linear layers that
    are not part of the model.

    Args:
        model: gives the widths.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        assert model.encoder is not None
        D = model.backbone.config.width
        self.image = nn.Linear(model.encoder.width, D, bias=False)
        self.caption = nn.Linear(D, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        model: VisionLanguageModel,
        features: Tensor,
        tile_rows: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """The symmetric loss of a batch.

        Args:
            model: whose backbone reads the captions.
            features: ``[N, P, V]`` of the batch's tiles.
            tile_rows: ``[N]``, the row that each tile belongs to.
            tokens: the captions ``[n, T]``, padded on the right.
            lengths: ``[n]``, of the captions.
            rows: ``[n]``, the row that each caption belongs to.
        """
        own = torch.arange(len(rows), device=rows.device)
        with torch.no_grad():
            captions = model.backbone(tokens).hidden[own, lengths - 1]
        assert model.encoder is not None
        tiles = model.encoder.patch_mean(features)
        B = int(tile_rows.max()) + 1
        images = tiles.new_zeros(B, tiles.shape[1]).index_add(0, tile_rows, tiles)  # summed
        seen = F.normalize(self.image(images[rows]), dim=-1)
        read = F.normalize(self.caption(captions), dim=-1)
        similarity = self.log_scale.clamp(max=math.log(100)).exp() * seen @ read.T
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def _captions(batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
    """The captions among the batch's answers: tokens ``[n, T]``, lengths and rows; None if none."""
    spelled = [
        batch.answers == number for number, kind in enumerate(batch.kinds) if kind == "caption"
    ]
    if not spelled:
        return None
    texts = [batch.labels[places] for places in spelled]
    lengths = torch.tensor([len(text) for text in texts], device=batch.labels.device)
    rows = torch.stack([places.any(1).int().argmax() for places in spelled])
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths, rows
