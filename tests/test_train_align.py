"""Alignment through a frozen language model: who learns, who does not, and by which loss."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import export_hf, load_model, save_model
from sandbox.data.batch import Batch, collate
from sandbox.data.charts import Charts
from sandbox.data.module import VQAData
from sandbox.data.words import Described
from sandbox.errors import UserError
from sandbox.model import Output, VisionLanguageModel
from sandbox.tokenizer import Tokenizer
from sandbox.train.align import Align
from sandbox.train.optim import OptimizerConfig

CONFIG = BackboneConfig(width=32, layers=2, heads=2, head_dim=16, expert_hidden=16)


@pytest.fixture
def reader(tmp_path: Path) -> str:
    """The checkpoint of a small language model, whose balancing bias has moved."""
    torch.manual_seed(1)
    model = VisionLanguageModel(None, None, CONFIG, Tokenizer.load("small"))
    for mixture in model.backbone.mixtures().values():
        mixture.balance_bias.normal_(std=0.1)
    path = tmp_path / "reader.safetensors"
    save_model(model, path)
    return str(path)


def aligned(reader: str, **options: Any) -> Align:
    """A small encoder in front of the language model."""
    torch.manual_seed(0)
    encoder = Patches(tile_size=32, patch_size=8, width=24)
    optimizer = OptimizerConfig(warmup=0, weight_decay=0.1)
    return Align(reader, encoder, EarlyFusion, optimizer=optimizer, **options)


def data(**options: Any) -> VQAData:
    """Charts with questions and captions."""
    return VQAData(Described(Charts(size=32)), batch_size=4, **options)


def fit(align: Align, folder: Path, steps: int = 3, **options: Any) -> None:
    """Train for some steps, validating once."""
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(align, data(val_samples=2))


def batch_for(align: Align, split: str = "train", count: int = 3) -> Batch:
    """The first samples of a split as one batch."""
    task: Any = Described(Charts(size=32))
    samples = [task.sample(split, index) for index in range(count)]
    return collate([align.model.prompts.encode_sample(sample) for sample in samples], name="b")


def state(align: Align) -> dict[str, Tensor]:
    """A copy of everything the model holds, buffers that no checkpoint keeps included."""
    held = [*align.model.named_parameters(), *align.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in held}


def test_captions_are_contrasted_by_one_process_alone(reader: str):
    """Guards against another loss, without a word, where captions meet only their process's."""
    two = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    plain, contrasted = aligned(reader), aligned(reader, contrastive=0.5)
    plain.trainer = contrasted.trainer = two
    plain.setup("fit")
    contrasted.setup("test")
    with pytest.raises(UserError, match=r"contrastive=0\.5 with 2 processes"):
        contrasted.setup("fit")


@pytest.mark.parametrize("contrastive", [0.0, 0.5])
def test_no_byte_of_the_language_model_moves(reader: str, tmp_path: Path, contrastive: float):
    """Guards against decay, a balancing bias or the auxiliary loss that reaches the frozen model:
    the encoder would then be trained against another model in every step.
    """
    align = aligned(reader, contrastive=contrastive)
    before = state(align)
    fit(align, tmp_path)
    moved = {name for name, tensor in state(align).items() if not tensor.equal(before[name])}
    backbone = {name for name in before if name.startswith("backbone.")}
    assert "backbone.layers.0.ffn.balance_bias" in backbone, "a buffer is among what is compared"
    assert moved == before.keys() - backbone


def test_gradients_pass_through_the_frozen_model_and_stay_in_front_of_it(reader: str):
    """Guards against a backward pass that stops at the frozen layers, or pays for their weights."""
    align = aligned(reader)
    align(batch_for(align)).loss.backward()
    for name, parameter in align.model.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_language_model_stays_in_eval_mode(reader: str, tmp_path: Path):
    """Guards against Lightning's ``train()``, which switches every part before each epoch."""

    class Watched(Align):
        modes: set[tuple[bool, bool]]

        def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
            self.modes.add((self.model.backbone.training, self.model.encoder.training))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    encoder = Patches(tile_size=32, patch_size=8, width=24)
    align = Watched(reader, encoder, EarlyFusion)
    align.modes = set()
    fit(align, tmp_path, steps=2)
    assert align.modes == {(False, True)}


def test_text_reads_as_the_language_model_alone_reads_it(reader: str):
    """Guards against a model built anew around the configuration, with other weights in it."""
    tokens = torch.randint(0, 500, (2, 9))
    plain = load_model(reader)(tokens=tokens).logits
    assert aligned(reader).model(tokens=tokens).logits.equal(plain)


def test_only_the_named_parts_learn(reader: str, tmp_path: Path):
    """Guards against a tower that learns although just the projector was to."""
    align = aligned(reader, train_only=["fusion", "encoder.norm"])
    before = state(align)
    fit(align, tmp_path)
    moved = {name for name, tensor in state(align).items() if not tensor.equal(before[name])}
    expected = {name for name in before if name.startswith(("fusion.", "encoder.norm."))}
    assert moved == expected


def test_the_auxiliary_loss_is_clips(reader: str):
    """Guards against captions or images of another row, and against a wrong temperature."""
    align = aligned(reader, contrastive=0.5)
    assert align.contrast is not None
    batch = batch_for(align)
    output: Output = align(batch)
    plain: Output = align.model(batch)

    told = [Charts(size=32).sample("train", index).text for index in range(3)]
    tokenizer = align.model.tokenizer
    seen, read = [], []
    with torch.no_grad():
        features = align.model.features(batch)
        for row, text in enumerate(told):
            tokens = torch.tensor([[*tokenizer.encode(text), tokenizer.eot]])
            hidden = align.model.backbone(tokens).hidden[0, -1]
            read.append(F.normalize(align.contrast.caption(hidden), dim=0))
            seen.append(F.normalize(align.contrast.image(features[row].mean(0)), dim=0))
        logits = torch.stack(seen) @ torch.stack(read).T / 0.07
        both = (logits.log_softmax(1).diag() + logits.log_softmax(0).diag()) / 2
    torch.testing.assert_close(output.parts["contrastive"], -both.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, plain.loss - 0.5 * both.mean(), atol=1e-5, rtol=0)


def test_the_auxiliary_loss_without_captions_is_refused(reader: str):
    """Guards against a coefficient that is silently without effect."""
    align = aligned(reader, contrastive=0.5)
    with pytest.raises(UserError, match=r"needs images with captions.*Described"):
        align(batch_for(align, split="val"))


def test_two_runs_of_one_seed_agree_in_every_bit(reader: str, tmp_path: Path):
    """Guards against anything drawn from outside the seed."""
    runs = []
    for name in ("one", "other"):
        align = aligned(reader, contrastive=0.5)
        fit(align, tmp_path / name)
        runs.append(state(align))
    assert all(tensor.equal(runs[1][name]) for name, tensor in runs[0].items())


def test_the_encoder_learns_what_the_frozen_model_wants_to_hear(reader: str):
    """Guards against gradients of the wrong sign: the loss of one batch must fall steadily."""
    align = aligned(reader)
    batch = batch_for(align)
    optimizer = torch.optim.Adam([p for p in align.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = align(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] - 0.15 > losses[30] > losses[59]


def test_a_language_model_of_transformers_will_do(tmp_path: Path):
    """Guards against a path that only checkpoints of ours can be given to."""
    torch.manual_seed(1)
    model = VisionLanguageModel(None, None, CONFIG, Tokenizer.load("small"))
    save_model(model, tmp_path / "reader.safetensors")
    export_hf(tmp_path / "reader.safetensors", tmp_path / "theirs")
    tokens = torch.randint(0, 500, (1, 7))
    align = aligned(str(tmp_path / "theirs"))
    torch.testing.assert_close(align.model(tokens=tokens).logits, model(tokens=tokens).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_only": ["backbone.layers.0"]}, "no part of encoder or fusion"),
        ({"train_only": ["encoder.tower"]}, "train_only: the model has no part 'encoder.tower'"),
        ({"train_only": []}, "nothing to train"),
        ({"init_from": {"encoder": "nowhere"}}, "nowhere: no such checkpoint"),
    ],
)
def test_mistakes_are_named(reader: str, options: dict[str, Any], message: str):
    """Guards against a run that trains something else than was meant."""
    with pytest.raises(UserError, match=message):
        aligned(reader, **options)


def test_a_language_model_that_is_not_there_is_named(tmp_path: Path):
    """Guards against an error from deep inside, about a file that nobody wrote."""
    with pytest.raises(UserError, match=r"missing: no such checkpoint"):
        aligned(str(tmp_path / "missing"))
