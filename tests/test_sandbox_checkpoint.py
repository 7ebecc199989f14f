"""Checkpoints: they rebuild the model without its code being told how, or say why not."""

import pickle
from importlib.metadata import version

import pytest
import torch
from PIL import Image as PILImage

from encoders.metaclip import MetaCLIP
from encoders.patches import Patches
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.checkpoint import build_model, load_model, load_weights, read_checkpoint, save_model
from sandbox.data.batch import Batch, collate
from sandbox.data.prompt import Prompt
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer


def build(encoder=None, **changes) -> VisionLanguageModel:
    """A small model with every kind of field set."""
    config = BackboneConfig(
        **{"width": 32, "head_dim": 16, "heads": 2, "rope_scaling": RopeScaling(4, 1, 2, 64)}
        | changes
    )
    encoder = encoder or Patches(tile_size=16, patch_size=4, width=24)
    return VisionLanguageModel(
        encoder, lambda *sizes: EarlyFusion(*sizes, shuffle=4), config, Tokenizer.load()
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_rebuilds_its_model(tmp_path, tied):
    """Guards against a checkpoint that needs the run's YAML to be read."""
    model = build(tied=tied)
    model.backbone.layers[0].ffn.balance_bias.fill_(0.5)
    path = tmp_path / "model.safetensors"
    save_model(model, path, seed=7)
    loaded = load_model(path)
    assert not loaded.training
    assert loaded.backbone.config == model.backbone.config
    assert loaded.fusion.tokens_per_tile == model.fusion.tokens_per_tile == 1
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    description, _ = read_checkpoint(path)
    assert description["seed"] == 7
    assert description["provenance"]["torch"] == version("torch")


def test_loaded_weights_train_and_move_as_one(tmp_path):
    """Guards against a tied head that parts from its embedding, and weights left on no device."""
    save_model(build(tied=True), tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    backbone = model.backbone
    assert backbone.head.weight is backbone.embed.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = collate([model.prompts.encode(Prompt.ask("how many?"), loss="text")])
    model(batch).loss.backward()
    optimizer.step()
    model.to(torch.bfloat16)
    assert backbone.head.weight is backbone.embed.weight
    assert model(batch).logits.dtype == torch.bfloat16
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_loaded_model_outlives_its_file(tmp_path):
    """Guards against weights that are views of a file, which the next save replaces."""
    path = tmp_path / "model.safetensors"
    save_model(build(), path)
    model = load_model(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


class Tabled(Patches):
    """An encoder with a table that no checkpoint holds, made without a thought of devices."""

    def __init__(self, tile_size: int = 16, patch_size: int = 4, width: int = 24) -> None:
        super().__init__(tile_size, patch_size, width)
        self.register_buffer("table", torch.arange(float(width)), persistent=False)


class Computed(Patches):
    """An encoder that computes with its tensors while it is built."""

    def __init__(self, tile_size: int = 16, patch_size: int = 4, width: int = 24) -> None:
        super().__init__(tile_size, patch_size, width)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]


@pytest.mark.parametrize("encoder", [Tabled, Computed])
def test_encoders_need_not_know_of_the_meta_device(encoder, tmp_path, monkeypatch):
    """Guards against plug-ins that train, and then cannot be loaded."""
    monkeypatch.setattr(f"encoders.patches.{encoder.__name__}", encoder, raising=False)
    monkeypatch.setattr(encoder, "__module__", "encoders.patches")
    model = build(encoder())
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").encoder
    assert loaded.embed.weight.equal(model.encoder.embed.weight)
    if encoder is Tabled:
        assert loaded.table.equal(model.encoder.table)
    else:
        assert loaded.rates == [0, 0.5, 1]


@pytest.mark.parametrize("tokenizer", [Tokenizer.load(), None], ids=["tokenizer", "ids alone"])
def test_a_language_model_is_saved_and_asked(tmp_path, tokenizer):
    """Guards against models without an encoder or a tokenizer that fail deep inside."""
    config = BackboneConfig(vocab_size=1040, width=32, head_dim=16, heads=2)  # rows to spare
    save_model(VisionLanguageModel(None, None, config, tokenizer), tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    tokens = torch.tensor([[1, 5, 7], [2, 2, 1039]])
    output = model(tokens=tokens)
    assert output.logits.equal(model.backbone.unembed(model.backbone(tokens).hidden))
    assert output.loss == 0
    pictured = Batch.of(tokens, tiles=torch.zeros(1, 3, 4, 4, dtype=torch.uint8), name="batch 7")
    with pytest.raises(UserError, match="batch 7 holds 1 image tiles, and the model is a language"):
        model(pictured)
    with pytest.raises(ValueError, match="a batch or tokens, one of them"):
        model(pictured, tokens=tokens)
    if tokenizer is None:
        with pytest.raises(UserError, match="no tokenizer"):
            model.generate([Prompt.ask("how many?")])
        with pytest.raises(UserError, match="no tokenizer: its checkpoint came without one"):
            _ = model.prompts
    else:
        assert len(model.generate([Prompt.ask("how many?")], max_tokens=2)) == 1
        with pytest.raises(UserError, match="a language model"):
            model.generate([Prompt.ask("how many?", [PILImage.new("RGB", (8, 8))])])


def test_open_clip_towers_are_rebuilt_too(tmp_path):
    """Guards against an encoder whose arguments are not plain values."""
    model = build(MetaCLIP(tile_size=16, patch_size=4, width=32, layers=1, heads=1))
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").encoder.width == 32


def test_weights_of_another_configuration_are_named(tmp_path):
    """Guards against a page of size mismatches, and against half-loaded weights."""
    model, wider = build(), build(width=48)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        UserError,
        match=r"other\.ckpt is of another configuration: .* of another "
        r"shape, e\.g\. backbone\.embed\.weight",
    ):
        load_weights(model, wider.state_dict(), source="other.ckpt")
    shallow = build(layers=2).state_dict()
    with pytest.raises(UserError, match=r"missing, e\.g\. backbone\.layers\.2"):
        load_weights(model, shallow, source="other.ckpt")
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


def test_unusable_files_say_why(tmp_path):
    """Guards against tracebacks, and against ever unpickling a class."""
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")

    model = tmp_path / "model.safetensors"
    save_model(build(), model)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_checkpoint(cut)

    evil = tmp_path / "evil.ckpt"
    evil.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError, match=r"safe|damaged"):
        read_checkpoint(evil)

    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(UserError, match="not one of this project"):
        read_checkpoint(foreign)


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_only_components_of_the_right_kind_are_built():
    """Guards against a checkpoint that names any class it likes."""
    description = build().describe()
    description["encoder"] = {"class_path": "fusion.early.EarlyFusion", "init_args": {}}
    with pytest.raises(UserError, match="no VisionEncoder"):
        build_model(description)
    description["encoder"] = {"class_path": "encoders.nothing.Here", "init_args": {}}
    with pytest.raises(UserError, match="which is not there"):
        build_model(description)
