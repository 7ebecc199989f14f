"""Contrastive training: images and their captions find each other among those of a batch.

The loss is CLIP's (arXiv 2103.00020, figure 3) as open_clip computes it, and MetaCLIP's recipe
(arXiv 2309.16671) is CLIP's on curated data. The text tower is open_clip's and serves this stage
alone: later stages take the encoder. open_clip is imported when a module is built, since that takes
seconds and needs a matching torchvision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from encoders.base import VisionEncoder
from sandbox.checkpoint import provenance, write_safetensors
from sandbox.data.captions import CaptionTokens, PairEncoder, Pairs
from sandbox.errors import UserError
from sandbox.model import described
from sandbox.train.callbacks import facts, of_all_processes
from sandbox.train.objective import Objective
from sandbox.train.optim import OptimizerConfig
from sandbox.train.update import over_processes

Pool = Literal["summary", "patches"]

FIRST_SCALE = math.log(1 / 0.07)  # CLIP's first temperature, and the largest scale that it allows
LAST_SCALE = math.log(100)
ENCODER = "encoder.safetensors"  # what a finished run leaves for later stages
ROWS = 1024  # queries compared with all candidates at once


@dataclass(frozen=True)
class TextTower:
    """The shape of a text tower; the defaults are those of MetaCLIP's ViT-B.

    Attributes:
        context_length: tokens a caption, begin and end included.
        width, heads, layers: of its causal transformer.
        quick_gelu: QuickGELU, as in MetaCLIP 1, instead of GELU.
    """

    context_length: int = 77
    width: int = 512
    heads: int = 8
    layers: int = 12
    quick_gelu: bool = True


@dataclass(frozen=True)
class Embedded:
    """A batch in the space that images and captions share.

    Attributes:
        images, texts: ``[B, embed_dim]`` of length 1.
        scale: what their products are multiplied by.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor

    @property
    def parts(self) -> dict[str, Tensor]:
        """The two halves of the loss over these pairs alone, to see which is not finite."""
        logits = self.scale * self.images @ self.texts.T
        own = torch.arange(len(logits), device=logits.device)
        return {
            "image_to_text": F.cross_entropy(logits, own),
            "text_to_image": F.cross_entropy(logits.T, own),
        }


class ContrastiveModel(nn.Module):
    """An encoder and a text tower, each with a projection to the space that they share.

    Args:
        encoder: pixels to features.
        text: shape of the text tower, whose end token stands for a caption.
        embed_dim: width of the shared space.
        tokenizer: see ``CaptionTokens``.
        pool: what stands for an image, see ``Contrastive``.

    Raises:
        UserError: the tower's width does not divide into its heads.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        text: TextTower,
        embed_dim: int,
        tokenizer: str,
        pool: Pool = "summary",
    ) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        if text.width % text.heads:
            raise UserError(f"text.width ({text.width}) must divide by text.heads ({text.heads})")
        self.encoder = encoder
        self.pool = pool
        self.tower = text
        self.tokens = CaptionTokens(tokenizer, text.context_length)
        self.text = TextTransformer(
            context_length=text.context_length,
            vocab_size=self.tokens.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            output_dim=embed_dim,
            eos_id=self.tokens.end,
            pool_type="eos",  # in CLIP the end token is found as the largest id, here by its own
            act_layer=QuickGELU if text.quick_gelu else nn.GELU,
        )
        self.projection = nn.Linear(encoder.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=encoder.width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE))

    @property
    def pairs(self) -> PairEncoder:
        """Turns pairs into what this model reads."""
        return PairEncoder(self.encoder.tile_size, self.tokens)

    def embed_images(self, tiles: Tensor) -> Tensor:
        """Uint8 tiles ``[N, 3, S, S]`` to ``[N, embed_dim]`` of length 1."""
        normal = self.encoder.normalize(tiles)
        if self.pool == "summary":
            pooled = self.encoder.summary(normal)
        else:
            pooled = self.encoder.patch_mean(self.encoder(normal))
        return F.normalize(self.projection(pooled), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Captions ``[n, context_length]`` to ``[n, embed_dim]`` of length 1."""
        return F.normalize(self.text(tokens), dim=-1)

    def forward(self, batch: Pairs) -> Embedded:
        """Images and captions of a batch in the shared space."""
        images, texts = self.embed_images(batch.tiles), self.embed_texts(batch.tokens)
        return Embedded(images, texts, self.logit_scale.exp())

    def describe(self) -> dict[str, object]:
        """Plain values that tell this architecture."""
        return {
            "encoder": described(self.encoder),
            "text": asdict(self.tower),
            "embed_dim": self.projection.out_features,
            "pool": self.pool,
            "tokenizer": self.tokens.describe(),
        }


@dataclass(frozen=True)
class _Seen:
    """What validation keeps of a batch, on the CPU."""

    loss: float
    images: Tensor
    texts: Tensor
    tokens: Tensor
    labels: list[str | None]


class Contrastive(Objective):
    """Trains an encoder, and a text tower beside it, on images with captions.

    Every pair is contrasted with the others of the step on all processes, which hold equally many;
    batches whose gradients are accumulated are not contrasted with each other, and their losses are
    averaged. When training ends the encoder is written to
    ``encoder.safetensors`` in the run directory.

    Validation logs ``val/loss`` (as in training, over single batches); over all of the split,
    ``val/image_to_text@k`` (share of images whose caption is among the k most similar ones) and
    ``val/text_to_image@k`` (share of captions with one of their images among the k most similar),
    equal captions being one caption; and, where pairs have labels, ``val/zero_shot``: the share of
    images whose own class is the most similar. Ties count as wrong.

    Args:
        encoder: pixels to features.
        text: shape of the text tower.
        embed_dim: width of the space that images and captions share.
        tokenizer: ``small``, the path of a vocabulary, or ``clip``.
        pool: what stands for an image: the encoder's own ``summary`` (CLIP's class token), or the
            mean of its ``patches``. A class token leaves the patches of the last layer untrained,
            and those are what a fusion reads.
        optimizer: how parameters move.
        templates: sentences whose ``{}`` a class takes in zero-shot classification; a class is the
            mean of its sentences' embeddings, as in CLIP.
        compile: see ``Objective``.

    Raises:
        UserError: a template has no ``{}``, or see ``ContrastiveModel``.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        text: TextTower = TextTower(),
        embed_dim: int = 512,
        tokenizer: str = "small",
        pool: Pool = "summary",
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen, so safe to share)
        templates: Sequence[str] = ("a photo of a {}.",),
        compile: bool = False,
    ) -> None:
        if not templates or not all("{}" in template for template in templates):
            raise UserError(f"templates {list(templates)}: each needs a {{}} for the class")
        model = ContrastiveModel(encoder, text, embed_dim, tokenizer, pool)
        super().__init__(model, optimizer, compile=compile)
        from open_clip.loss import ClipLoss

        self.templates = templates
        self.contrast = ClipLoss(local_loss=True, gather_with_grad=True)
        self._seen: list[_Seen] = []  # by one validation
        self._losses: list[Tensor] = []  # of this process, since the last update

    def setup(self, stage: str) -> None:
        """Gather the pairs of all processes."""
        self.contrast.rank = self.trainer.global_rank
        self.contrast.world_size = self.trainer.world_size

    def forward(self, batch: Pairs) -> Embedded:
        """Images and captions of a batch in the shared space."""
        return self.model(batch)

    def loss(self, batch: Pairs) -> Tensor:
        """What a training step minimises: the loss over the pairs of all processes."""
        return self._contrasted(self(batch))

    def _contrasted(self, embedded: Embedded) -> Tensor:
        return self.contrast(embedded.images, embedded.texts, embedded.scale)

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """The loss of one batch, over the pairs of all processes."""
        embedded = self(batch)
        loss = self._contrasted(embedded)
        size = len(batch.tiles)
        self._losses.append(loss.detach())
        self.log("train/logit_scale", embedded.scale.detach(), batch_size=size)
        return loss

    def on_train_start(self) -> None:
        """Forget the losses of an interrupted update."""
        super().on_train_start()
        self._losses.clear()

    def on_after_backward(self) -> None:
        """Log the loss of a finished update; weigh its batches alike, however few there were."""
        if self.trainer.fit_loop._should_accumulate():
            return
        mean = torch.stack(self._losses).mean()
        count, divided = len(self._losses), self.trainer.accumulate_grad_batches
        self._losses.clear()
        if count < divided:  # the last of an epoch
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, divided / count)
        mean = over_processes(self.trainer, {"loss": mean})["loss"] / self.trainer.world_size
        self.log("train/loss", mean, prog_bar=True, batch_size=1)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """An update, after which the scale is brought back between 1 and 100."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, LAST_SCALE)

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Embed one batch of the validation split."""
        embedded = self(batch)
        self._seen.append(
            _Seen(
                loss=fmean(float(part) for part in embedded.parts.values()),
                images=embedded.images.float().cpu(),
                texts=embedded.texts.float().cpu(),
                tokens=batch.tokens.cpu(),
                labels=[None if n < 0 else batch.classes[n] for n in batch.labels.tolist()],
            )
        )

    def on_validation_epoch_end(self) -> None:
        """Log loss, retrieval and zero-shot accuracy over all that was seen."""
        seen = [one for many in of_all_processes(self.trainer, self._seen) for one in many]
        self._seen.clear()
        images = torch.cat([one.images for one in seen])
        texts = torch.cat([one.texts for one in seen])
        captions = torch.cat([one.tokens for one in seen]).unique(dim=0, return_inverse=True)[1]
        labels = [label for one in seen for label in one.labels]
        figures = {"val/loss": fmean([one.loss for one in seen], [len(s.images) for s in seen])}
        figures |= {
            f"val/{name}": value for name, value in retrieval(images, texts, captions).items()
        }
        if (accuracy := self._zero_shot(images, labels)) is not None:
            figures["val/zero_shot"] = accuracy
        self.log_dict(figures)

    def _zero_shot(self, images: Tensor, labels: Sequence[str | None]) -> float | None:
        """The share of labelled images that are nearest to their class; None without a choice."""
        classes = sorted({label for label in labels if label is not None})
        if len(classes) < 2:
            return None
        prompts = [t.replace("{}", name) for name in classes for t in self.templates]
        tokens = self.model.tokens.rows(prompts).to(self.device)
        texts = self.model.embed_texts(tokens).float().cpu()
        means = F.normalize(texts.unflatten(0, (len(classes), -1)).mean(1), dim=-1)
        labelled = torch.tensor([label is not None for label in labels])
        own = torch.tensor([classes.index(label) for label in labels if label is not None])
        wrong = ranks(images[labelled], means, own, torch.arange(len(classes)))
        return float((wrong == 0).float().mean())

    def on_train_end(self) -> None:
        """Write the encoder for later stages."""
        trainer: Any = self.trainer
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path = Path(trainer.default_root_dir) / ENCODER
            path.parent.mkdir(parents=True, exist_ok=True)
            save_encoder(self.model.encoder, path, **facts(trainer))


# --- Scores ---------------------------------------------------------------------------------------


def retrieval(images: Tensor, texts: Tensor, captions: Tensor) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, by name.

    Args:
        images: ``[n, embed_dim]`` of length 1.
        texts: ``[n, embed_dim]`` of length 1.
        captions: int64 ``[n]``, equal where captions are, counting 0, 1, 2, ...
    """
    distinct = torch.arange(int(captions.max()) + 1)
    first = (captions == distinct[:, None]).int().argmax(1)  # of equal captions one stands for all
    wrong = {
        "image_to_text": ranks(images, texts[first], captions, distinct),
        "text_to_image": ranks(texts[first], images, distinct, captions),
    }
    return {
        f"{name}@{k}": float((better < k).float().mean())
        for name, better in wrong.items()
        for k in (1, 5)
    }


def ranks(queries: Tensor, candidates: Tensor, groups: Tensor, candidate_groups: Tensor) -> Tensor:
    """How many wrong candidates are at least as similar as the best right one: int64 ``[n]``.

    Ties count as wrong: otherwise a model to which all is alike would be perfect.

    Args:
        queries: ``[n, embed_dim]``.
        candidates: ``[m, embed_dim]``, of which at least one is right for every query.
        groups: ``[n]``; right is a candidate of the same group.
        candidate_groups: ``[m]``.
    """
    found = []
    for some, group in zip(queries.split(ROWS), groups.split(ROWS), strict=True):
        similar = some @ candidates.T
        right = group[:, None] == candidate_groups
        best = similar.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((similar >= best) & ~right).sum(1))
    return torch.cat(found)


# --- The encoder alone ----------------------------------------------------------------------------


def save_encoder(encoder: VisionEncoder, path: str | Path, **facts: Any) -> None:
    """Write an encoder's weights and description to a safetensors file; ``facts`` join it.

    ``read_checkpoint`` reads it: the tensors are named ``encoder.*``, as in a whole model.

    Raises:
        UserError: it could not be written; what was at ``path`` is untouched.
    """
    model = {"encoder": described(encoder)}
    tensors = {f"encoder.{n}": t.detach().contiguous() for n, t in encoder.state_dict().items()}
    write_safetensors(tensors, {"model": model, "provenance": provenance(), **facts}, Path(path))
