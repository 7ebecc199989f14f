"""Contrastive training: open_clip's loss, scores over a whole split, and what a run leaves."""

import json
import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.base import VisionEncoder
from encoders.llama4_vit import Llama4Vision
from encoders.metaclip import MetaCLIP
from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import read_checkpoint
from sandbox.data.captions import CaptionData, CaptionSource, Pair, TaskCaptions
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.data.task import Split
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer
from sandbox.train.callbacks import Checkpoints, NonFiniteGuard
from sandbox.train.contrastive import (
    ENCODER,
    LAST_SCALE,
    Contrastive,
    ContrastiveModel,
    TextTower,
    ranks,
    retrieval,
    save_encoder,
)
from sandbox.train.optim import OptimizerConfig
from sandbox.train.pretrain import Pretrain
from sandbox.train.start import start_from

ROOT = Path(__file__).parents[1]
TEXT = TextTower(context_length=28, width=32, heads=2, layers=2)
ADAMW = OptimizerConfig(name="adamw", lr=3e-3, warmup=2)


class Few(CaptionSource):
    """Some charts, over and over, of two classes; validation shows the same ones."""

    def __init__(self, count: int = 32, labelled: bool = True) -> None:
        self.count = count
        self.labelled = labelled
        self.charts = TaskCaptions(Charts(size=32))

    def size(self, split: Split) -> int:
        return self.count

    def pair(self, split: Split, index: int) -> Pair:
        pair = self.charts.pair("train", index)
        label = f"{pair.caption.count(',') + 1} bars" if self.labelled else None
        return Pair(pair.image, pair.caption, label)

    def identity(self) -> str:
        return f"{self.count} {self.labelled}"


def tower(width: int = 32) -> MetaCLIP:
    return MetaCLIP(tile_size=32, patch_size=8, width=width, layers=2, heads=2)


def build(encoder: VisionEncoder | None = None, seed: int = 0, **options: Any) -> Contrastive:
    torch.manual_seed(seed)
    defaults = {"text": TEXT, "embed_dim": 24, "optimizer": ADAMW}
    return Contrastive(encoder or tower(), **(defaults | options))


def trainer(folder: Path, steps: int, **options: Any) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**(defaults | options))


def fit(module: Contrastive, folder: Path, steps: int = 3, **options: Any) -> lightning.Trainer:
    run = trainer(folder, steps, **options)
    run.fit(module, CaptionData(Few(), batch_size=12))
    return run


def weights(module: Contrastive) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not tensor.equal(other[name])]


# --- Parity ---------------------------------------------------------------------------------------


def open_clip_twin(model: ContrastiveModel) -> Any:
    """open_clip's own CLIP, with the weights of a model whose encoder is a toy MetaCLIP."""
    import open_clip

    encoder = model.encoder
    assert isinstance(encoder, MetaCLIP)
    twin = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={
            "context_length": TEXT.context_length,
            "vocab_size": model.tokens.vocab_size,
            "width": TEXT.width,
            "heads": TEXT.heads,
            "layers": TEXT.layers,
            "pool_type": "eos",
            "eos_id": model.tokens.end,
        },
        quick_gelu=True,
    )
    state = {f"visual.{n}": t for n, t in encoder.visual.state_dict().items()}
    state |= {"visual.proj": model.projection.weight.T, "logit_scale": model.logit_scale}
    twin.load_state_dict(state | model.text.state_dict())
    return twin


def test_the_loss_is_that_of_open_clip(tmp_path: Path) -> None:
    """Guards against a projection, pooling, scale or gather that differs from CLIP's."""
    from open_clip.loss import ClipLoss

    module = build()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    twin = open_clip_twin(module.model)
    data = CaptionData(Few(), batch_size=12)
    data.pairs = module.model.pairs
    batch = next(iter(data.train_dataloader()))
    pixels = module.model.encoder.normalize(batch.tiles)
    images, texts = twin.encode_image(pixels, True), twin.encode_text(batch.tokens, True)
    expected = ClipLoss()(images, texts, twin.logit_scale.exp())
    expected.backward()

    fresh = deepcopy(module)
    run = fit(module, tmp_path, steps=1)  # logs the loss before the step
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(expected.item(), abs=1e-5)

    embedded = fresh(batch)
    loss = torch.stack(list(embedded.parts.values())).mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for ours, theirs in [
        (fresh.model.encoder.visual.conv1.weight.grad, twin.visual.conv1.weight.grad),
        (fresh.model.projection.weight.grad, twin.visual.proj.grad.T),
        (fresh.model.text.token_embedding.weight.grad, twin.token_embedding.weight.grad),
        (fresh.model.logit_scale.grad, twin.logit_scale.grad),
    ]:
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm())


# --- Training -------------------------------------------------------------------------------------


def test_an_image_may_be_the_mean_of_its_patches() -> None:
    """Guards against a choice that is recorded, and without effect."""
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    patches, summary = (build(pool=pool).model.eval() for pool in ("patches", "summary"))
    with torch.no_grad():
        features = patches.encoder(patches.encoder.normalize(tiles))
        mean = F.normalize(patches.projection(features.mean(1)), dim=-1)
        torch.testing.assert_close(patches.embed_images(tiles), mean, atol=1e-6, rtol=0)
        assert (summary.embed_images(tiles) - mean).abs().max() > 0.1
    assert patches.describe()["pool"] == "patches"


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    """Guards against training that nobody can repeat."""
    runs = [build(seed=seed) for seed in (3, 3, 4)]
    for run in runs:
        fit(run, tmp_path)
    assert not different(weights(runs[0]), weights(runs[1]))
    assert different(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("batches", [2, 1])
def test_accumulated_batches_are_averaged(tmp_path: Path, batches: int) -> None:
    """Guards against a logged loss that is the last batch's, and against a window that the end of
    an epoch cuts short and Lightning divides as if it were whole.
    """
    gradients: dict[str, Tensor] = {}

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in module.named_parameters()})

    module = build()
    fresh = deepcopy(module)
    limits = {"limit_train_batches": batches, "max_epochs": 1, "callbacks": [Watch()]}
    run = fit(module, tmp_path, steps=-1, accumulate_grad_batches=2, **limits)
    data = CaptionData(Few(), batch_size=12)
    data.pairs = fresh.model.pairs
    read = [batch for batch, _ in zip(data.train_dataloader(), range(batches), strict=False)]
    loss = torch.stack([fresh.loss(batch) for batch in read]).mean()
    loss.backward()
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in fresh.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_it_learns_a_few_pairs_by_heart(tmp_path: Path) -> None:
    """Guards against a loss that falls while image and caption do not meet, and wrong recall."""
    module = build(optimizer=OptimizerConfig(warmup=2))
    data = CaptionData(Few(), batch_size=32)
    run = trainer(tmp_path, steps=60)
    run.fit(module, data)
    assert float(run.callback_metrics["train/loss"]) < 0.1
    assert math.exp(module.model.logit_scale.item()) > 1 / 0.07  # the scale learns, too
    (scores,) = trainer(tmp_path, 0, limit_val_batches=1.0).validate(module, data, verbose=False)
    assert scores["val/loss"] < 0.1
    for name in ("image_to_text@1", "image_to_text@5", "text_to_image@1", "text_to_image@5"):
        assert scores[f"val/{name}"] == 1
    assert 0 <= scores["val/zero_shot"] <= 1


ENCODERS = {
    "metaclip": tower,
    "patches": lambda: Patches(tile_size=32, patch_size=8, width=32),
    "llama4": lambda: Llama4Vision(32, patch_size=8, width=32, layers=1, heads=2, hidden=64),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_learns_and_moves_on(name: str, tmp_path: Path) -> None:
    """Guards against a tower that gets no gradient, or whose weights no later stage can load."""
    module = build(ENCODERS[name]())
    before = weights(module)
    fit(module, tmp_path)
    still = before.keys() - set(different(before, weights(module)))
    unused = {"encoder.class_token"} if name == "llama4" else set()
    assert still <= unused

    description, tensors = read_checkpoint(tmp_path / ENCODER)
    assert description["data"]["identity"]
    assert {key.split(".")[0] for key in tensors} == {"encoder"}
    assert description["model"] == json.loads(
        json.dumps({"encoder": module.model.describe()["encoder"]})
    )
    config = BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=16)
    later = VisionLanguageModel(ENCODERS[name](), EarlyFusion, config, Tokenizer.load("small"))
    start_from(later, {"encoder": str(tmp_path / ENCODER)})
    trained = module.model.encoder.state_dict()
    assert all(t.equal(trained[n]) for n, t in later.encoder.state_dict().items())


def test_the_scale_stays_between_1_and_100(tmp_path: Path) -> None:
    """Guards against a temperature that runs away (arXiv 2103.00020, section 2.5)."""
    for start, end in [(LAST_SCALE + 1, LAST_SCALE), (-1.0, 0.0)]:
        module = build()
        module.model.logit_scale.data.fill_(start)
        fit(module, tmp_path, steps=1)
        assert module.model.logit_scale.item() == pytest.approx(end)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_ends_like_one_that_never_stopped(name: Any, tmp_path: Path) -> None:
    """Guards against pairs that are skipped or repeated, and state that a checkpoint lacks."""
    options = {"optimizer": OptimizerConfig(name=name, warmup=1)}
    done = {"enable_checkpointing": True, "limit_val_batches": 1.0, "val_check_interval": 2}
    whole, stopped, resumed = (build(seed=seed, **options) for seed in (0, 0, 9))
    fit(whole, tmp_path / "whole", steps=5, callbacks=[Checkpoints()], **done)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    fit(stopped, tmp_path / "parts", steps=5, callbacks=[Checkpoints(), Stop()], **done)
    assert different(weights(whole), weights(stopped))
    run = trainer(tmp_path / "parts", 5, callbacks=[Checkpoints()], **done)
    last = tmp_path / "parts/checkpoints/last.ckpt"
    run.fit(resumed, CaptionData(Few(), batch_size=12), ckpt_path=last, weights_only=True)
    assert not different(weights(whole), weights(resumed))

    description, tensors = read_checkpoint(last)
    parts = {"encoder", "text", "embed_dim", "pool", "tokenizer"}
    assert description["model"].keys() == parts
    assert not different(weights(resumed), tensors)


def test_a_checkpoint_gives_the_same_scores(tmp_path: Path) -> None:
    """Guards against weights that are saved and not loaded; and refuses those of another shape."""
    module = build()
    done = {"enable_checkpointing": True, "limit_val_batches": 1.0}
    run = fit(module, tmp_path, callbacks=[Checkpoints()], **done)
    data = CaptionData(Few(), batch_size=12)
    (expected,) = run.validate(module, data, verbose=False)
    last = tmp_path / "checkpoints/last.ckpt"
    other = trainer(tmp_path, 0, **done)
    (found,) = other.validate(build(seed=5), data, ckpt_path=last, verbose=False, weights_only=True)
    assert found == expected
    with pytest.raises(UserError, match=r"another configuration: .* projection\.weight"):
        other.validate(build(embed_dim=8), data, ckpt_path=last, weights_only=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Guards against a guard that knows next-token batches alone."""
    module = build()
    with torch.no_grad():
        module.model.logit_scale.fill_(1000.0)
    with pytest.raises(UserError, match=r"train samples .*'image_to_text' is nan"):
        fit(module, tmp_path, callbacks=[NonFiniteGuard()])


# --- Scores ---------------------------------------------------------------------------------------


def test_ranks_are_those_of_a_plain_loop() -> None:
    """Guards against wrong places in a sorted list, and queries lost between chunks."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(2100, 4, generator=generator), dim=-1)
    candidates = F.normalize(torch.randn(30, 4, generator=generator), dim=-1)
    groups = torch.randint(0, 10, (2100,), generator=generator)
    candidate_groups = torch.arange(30) % 10
    found = ranks(queries, candidates, groups, candidate_groups)
    for q in range(0, 2100, 7):
        order = (queries[q] @ candidates.T).argsort(descending=True)
        right = (candidate_groups[order] == groups[q]).int().argmax()
        assert int(found[q]) == int(right)


def test_equal_captions_are_one_caption() -> None:
    """Guards against a perfect model that is marked down for choosing a caption's other image."""
    axes = torch.eye(3)
    captions = torch.tensor([0, 0, 1, 2])
    images = texts = axes[captions]
    assert set(retrieval(images, texts, captions).values()) == {1.0}
    swapped = retrieval(images, axes[torch.tensor([1, 1, 0, 2])], captions)
    assert swapped["image_to_text@1"] == 1 / 4  # images 0, 0 and 1 find another's caption
    assert swapped["text_to_image@1"] == pytest.approx(1 / 3)


def test_a_collapsed_model_finds_nothing() -> None:
    """Guards against ties that count as right: all embeddings alike would be perfect."""
    same = F.normalize(torch.ones(12, 4), dim=-1)
    scores = retrieval(same, same, torch.arange(12))
    assert set(scores.values()) == {0.0}


def test_zero_shot_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Guards against classes of single batches, templates out of order, and labels left out."""

    class Half(Few):
        def pair(self, split: Split, index: int) -> Pair:
            pair = super().pair(split, index)
            return pair if index % 2 else Pair(pair.image, pair.caption)

    templates = ["bar chart: {}.", "{}", "a plot with {} of colour."]
    module = build(templates=templates).eval()
    source = Half()
    run = trainer(tmp_path, 0, limit_val_batches=1.0)
    data = CaptionData(source, batch_size=5)
    (scores,) = run.validate(module, data, verbose=False)

    model, right = module.model, []
    labelled = [source.pair("val", index) for index in range(1, 32, 2)]
    classes = sorted({str(pair.label) for pair in labelled})
    with torch.no_grad():
        means = []
        for name in classes:
            texts = [model.embed_texts(model.tokens.rows([t.format(name)])) for t in templates]
            means.append(F.normalize(torch.cat(texts).mean(0), dim=0))
        for pair in labelled:
            (image,) = model.embed_images(model.pairs([pair]).tiles)
            best = int(torch.stack([image @ mean for mean in means]).argmax())
            right.append(classes[best] == pair.label)
    assert len(classes) > 2
    assert scores["val/zero_shot"] == pytest.approx(sum(right) / len(right))
    (plain,) = run.validate(module, CaptionData(Few(labelled=False), 8), verbose=False)
    assert "val/zero_shot" not in plain


# --- Wrong inputs, and the command line -----------------------------------------------------------


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    """Guards against a traceback where one line would do."""
    with pytest.raises(UserError, match=r"each needs a \{\} for the class"):
        build(templates=["a photo."])
    with pytest.raises(UserError, match=r"text\.width \(32\) must divide by text\.heads \(3\)"):
        build(text=TextTower(width=32, heads=3))
    with pytest.raises(UserError, match="give 'small'"):
        build(tokenizer="none.json")
    config = BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=16)
    with pytest.raises(UserError, match="give VQAData the task"):
        trainer(tmp_path, 1).fit(Pretrain(tower(), EarlyFusion, config), CaptionData(Few()))
    with pytest.raises(UserError, match="reads no prompts"):
        trainer(tmp_path, 1).fit(build(), VQAData(Charts(size=32)))
    with pytest.raises(UserError, match="CaptionData has no sample to train on"):
        trainer(tmp_path, 1).fit(build(), CaptionData(Few(0)))


def test_an_encoder_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """Guards against a full disk that takes the encoder before, too."""
    path = tmp_path / ENCODER
    save_encoder(tower(), path, seed=7)
    assert read_checkpoint(path)[0]["seed"] == 7
    with pytest.raises(UserError, match="could not be written"):
        save_encoder(tower(), tmp_path / "none" / ENCODER)


@pytest.mark.slow
def test_the_shipped_recipe_trains_alike_on_one_and_two_processes(tmp_path: Path) -> None:
    """Guards against a recipe that does not start, and pairs that meet no other process's."""
    recipe = str(ROOT / "experiments/encoder_stages/contrastive.yaml")
    command = [sys.executable, "-m", "sandbox.cli", "fit", "--config", recipe]
    command += ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3"]
    command += ["--data.val_samples", "16", "--model.optimizer.warmup", "0"]
    one = ["--data.batch_size", "16"]
    two = ["--data.batch_size", "8", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    encoders = []
    for name, options in {"start": one, "one": one, "two": two}.items():
        folder = tmp_path / name
        options = [*options, "--trainer.default_root_dir", str(folder)]
        if name == "start":
            options += ["--model.optimizer.lr", "0"]
        subprocess.run([*command, *options], check=True, timeout=300, stdout=subprocess.DEVNULL)
        (run,) = folder.iterdir()
        description, tensors = read_checkpoint(run / ENCODER)
        assert description["model"]["encoder"]["class_path"] == "encoders.metaclip.MetaCLIP"
        assert json.loads((run / "run.json").read_text())["sessions"][0]["data"]["identity"]
        encoders.append(torch.cat([tensor.flatten() for tensor in tensors.values()]))
    start, single, both = encoders
    assert float((both - single).norm()) < 0.02 * float((single - start).norm()) > 0
