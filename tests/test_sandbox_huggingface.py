"""Checkpoints of transformers: the same model here, and the same bytes on the way back."""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders.llama4_vit import Llama4Vision
from encoders.mllama_vit import MllamaVision
from encoders.patches import Patches
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox import cli
from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.checkpoint import export_hf, import_hf, load_hf, load_model, save_model
from sandbox.data.batch import Batch, collate
from sandbox.data.prompt import Image, Prompt, Turn
from sandbox.errors import UserError
from sandbox.huggingface.names import LAYOUTS
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="its checkpoints are read and written")

from tests.reference import LOGITS, randomize, their_greedy  # noqa: E402

VOCABULARY, PATCH_ID = 97, 90
BAND = {  # Llama 3.1's scaling, which blends some frequencies
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LLAMA4 = {
    **DECODER,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "intermediate_size_mlp": 80,
    "num_local_experts": 3,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "rms_norm_eps": 0.01,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vision_output_dim": 40,
    "projector_input_dim": 40,
    "projector_output_dim": 40,
    "image_size": 16,
    "patch_size": 4,
}
MLLAMA_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 96,
    "intermediate_layers_indices": [0, 2],
    "image_size": 16,
    "patch_size": 4,
}


def toy(kind: str, vision: Mapping[str, Any] | None = None, **text: Any) -> Any:
    """One of transformers' models at toy size, with random weights."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": 3, **text})
        model = transformers.LlamaForCausalLM(config)
    elif kind == "llama4_text":
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**(LLAMA4 | text)))
    elif kind == "llama4":
        config = transformers.Llama4Config(
            vision_config=VISION, text_config=LLAMA4 | text, image_token_index=PATCH_ID
        )
        model = transformers.Llama4ForConditionalGeneration(config)
    else:
        layers = {"num_hidden_layers": 6, "cross_attention_layers": [1, 4]}
        config = transformers.MllamaConfig(
            vision_config=MLLAMA_VISION | (vision or {}),
            text_config=DECODER | layers | {"bos_token_id": 1, "eos_token_id": 2} | text,
            image_token_index=VOCABULARY,
        )
        model = transformers.MllamaForConditionalGeneration(config)
    randomize(model)
    model.tie_weights()
    return model.eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def reloaded(model: Any, directory: Path) -> Any:
    """The model as transformers loads it from a directory, without a tensor too many or few."""
    loaded, report = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


def ids(rows: int = 2, columns: int = 29) -> Tensor:
    """Random text."""
    return torch.randint(1, PATCH_ID, (rows, columns), generator=torch.Generator().manual_seed(1))


def pixels(count: int, size: int = 16) -> Tensor:
    """Tiles of noise."""
    shape = (count, 3, size, size)
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


MODELS = {
    "llama4_text": ("llama4_text", {}),
    "every second layer a mixture": ("llama4_text", {"interleave_moe_layer_step": 2}),
    "dense": ("llama4_text", {"moe_layers": [], "use_qk_norm": False}),
    "two experts, scaled": ("llama4_text", {"num_experts_per_tok": 2, "rope_parameters": BAND}),
    "global": ("llama4_text", {"layer_types": ["full_attention"] * 5}),
    "tied": ("llama4_text", {"tie_word_embeddings": True, "attn_temperature_tuning": False}),
    "no NoPE layer": ("llama4_text", {"no_rope_layer_interval": 9}),
    "llama": ("llama", {}),
    "llama, scaled and tied": ("llama", {"rope_parameters": BAND, "tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 24, "num_key_value_heads": None}),
    "llama4": ("llama4", {"interleave_moe_layer_step": 2}),
    "llama4, tied": ("llama4", {"tie_word_embeddings": True}),
    "mllama": ("mllama", {}),
    "mllama, scaled": ("mllama", {"rope_parameters": BAND}),
}


def assert_same_bytes(before: Path, after: Path, dtype: torch.dtype) -> None:
    """Both directories hold the same tensors under the same names."""
    expected, found = tensors(before), tensors(after)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_the_same_model_there_here_and_back(kind, changes, tmp_path):
    """Guards against a rotation of halves for pairs, a swapped norm, a default taken wrongly."""
    theirs = toy(kind, **changes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    expected = theirs(ids()).logits
    ours = load_hf(tmp_path / "theirs")
    assert not ours.training
    torch.testing.assert_close(ours(tokens=ids()).logits, expected, atol=LOGITS, rtol=0)

    path, _ = import_hf(tmp_path / "theirs", tmp_path / "ours")
    shards = export_hf(path, tmp_path / "back", shard_gigabytes=6e-5)
    assert 1 < shards == len(list((tmp_path / "back").glob("*.safetensors")))
    assert_same_bytes(tmp_path / "theirs", tmp_path / "back", torch.float32)
    assert reloaded(theirs, tmp_path / "back")(ids()).logits.equal(expected)


@pytest.mark.filterwarnings("ignore:Casting complex values")  # transformers rounds a table, too
@pytest.mark.parametrize("kind", LAYOUTS)
def test_half_precision_in_one_file_keeps_every_byte(kind, tmp_path):
    """Guards against tensors that are rounded, and against another split into files."""
    theirs = toy(kind).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    path, _ = import_hf(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert path == tmp_path / "ours.safetensors"
    assert export_hf(path, tmp_path / "back") == 1
    assert_same_bytes(tmp_path / "theirs", tmp_path / "back", torch.bfloat16)
    reloaded(theirs, tmp_path / "back")


@pytest.mark.parametrize("dtype", ["float32", torch.float16, "keep"])
def test_types_are_converted_on_either_way(dtype, tmp_path):
    """Guards against a type that is written in the configuration but not in the file."""
    toy("llama").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    wanted = {"keep": torch.bfloat16, "float32": torch.float32}.get(dtype, dtype)
    model = load_hf(tmp_path / "theirs", dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {wanted}
    assert model.backbone.frequency.dtype == torch.float32
    path, _ = import_hf(tmp_path / "theirs", tmp_path / "model.safetensors")
    export_hf(path, tmp_path / "back", dtype)
    assert {tensor.dtype for tensor in tensors(tmp_path / "back").values()} == {wanted}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == str(wanted).removeprefix("torch.")


CASES = [(kind, number) for kind, layouts in LAYOUTS.items() for number in range(len(layouts))]


@pytest.mark.parametrize(("kind", "number"), CASES)
@torch.no_grad()
def test_every_way_to_name_the_parts_is_read_and_kept(kind, number, tmp_path):
    """Guards against checkpoints that another version of transformers wrote."""
    theirs = toy(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    layouts = LAYOUTS[kind]
    renamed = {}
    for name, tensor in tensors(tmp_path / "theirs").items():
        part = next(p for p, prefix in layouts[0]._asdict().items() if name.startswith(prefix))
        old, new = getattr(layouts[0], part), getattr(layouts[number], part)
        renamed[new + name.removeprefix(old)] = tensor
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old files
    save_file(renamed, tmp_path / "theirs" / "model.safetensors")
    path, _ = import_hf(tmp_path / "theirs", tmp_path)
    logits = load_model(path)(tokens=ids()).logits
    torch.testing.assert_close(logits, theirs(ids()).logits, atol=LOGITS, rtol=0)
    export_hf(path, tmp_path / "back")
    assert tensors(tmp_path / "back").keys() == renamed.keys() - {
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    }
    reloaded(theirs, tmp_path / "back")


def test_a_head_in_the_file_stays_a_head(tmp_path):
    """Guards against a head that a wrong configuration would replace by the embedding."""
    theirs = toy("llama")
    theirs.config.tie_word_embeddings = True
    theirs.save_pretrained(tmp_path)
    logits = load_hf(tmp_path)(tokens=ids()).logits
    torch.testing.assert_close(logits, theirs(ids()).logits, atol=LOGITS, rtol=0)


@torch.no_grad()
def test_images_of_llama_4(tmp_path):
    """Guards against a swapped projector, features on other tokens, and another normalisation."""
    theirs = toy("llama4")
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    tokens, tiles = ids(), pixels(3)
    for row, start in ((0, 2), (0, 9), (1, 5)):
        tokens[row, start : start + ours.fusion.tokens_per_tile] = PATCH_ID
    expected = theirs(tokens, pixel_values=(tiles / 255 - 0.5) / 0.5).logits
    batch = Batch.of(
        tokens, patches=tokens == PATCH_ID, tiles=tiles, tile_rows=torch.tensor([0, 0, 1])
    )
    torch.testing.assert_close(ours(batch).logits, expected, atol=LOGITS, rtol=0)


# Text before an image may see its blank tiles too, in transformers: there, an image has none.
@pytest.mark.parametrize(("start", "room"), [(0, 4), (3, 1)])
@torch.no_grad()
def test_images_of_llama_3_2(start, room, tmp_path):
    """Guards against adapters before the wrong layer, and gates or norms exchanged."""
    kinds = [[1, tiles] for tiles in range(1, room + 1)]
    theirs = toy("mllama", {"max_num_tiles": room, "supported_aspect_ratios": kinds})
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    ours.fusion.hf_compat = True
    tokens, tiles = ids(), pixels(2)
    tokens[:, start] = VOCABULARY  # one of the eight that are read and never predicted
    seen = torch.zeros(2, 29, 1, room)
    seen[:, start:, :, 0] = 1
    padded = torch.zeros(2, 1, room, 3, 16, 16)
    padded[:, 0, 0] = ours.encoder.normalize(tiles)
    expected = theirs(
        tokens,
        pixel_values=padded,
        aspect_ratio_ids=torch.ones(2, 1, dtype=torch.int64),
        aspect_ratio_mask=torch.eye(room, dtype=torch.int64)[:1].expand(2, 1, room),
        cross_attention_mask=seen,
    ).logits
    rows = {"tile_rows": torch.tensor([0, 1]), "tile_starts": torch.tensor([start, start])}
    batch = Batch.of(tokens, tiles=tiles, **rows)
    torch.testing.assert_close(ours(batch).logits, expected, atol=LOGITS, rtol=0)
    blind = ours(tokens=tokens).logits
    assert (blind - expected).abs().max() > 0.1  # the images did matter


# --- Models trained here --------------------------------------------------------------------------

TOKENIZER = Tokenizer.load()


def trained(balance: str = "loss", encoder: Any = None, **changes: Any) -> VisionLanguageModel:
    """A model of ours that transformers can express, unless changed."""
    torch.manual_seed(3)
    fusion = {"projector": "mlp", "shuffle": 2, "bidirectional": False}
    fusion = {key: changes.pop(key, value) for key, value in fusion.items()}
    fusion["hidden"] = 40 if fusion["projector"] == "mlp" else None
    config = {
        "vocab_size": TOKENIZER.vocab_size,
        "width": 64,
        "layers": 5,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "chunk": 16,
        "temperature_floor": 4,
        "rope_scaling": RopeScaling(8, 1, 4, 32),
    }
    model = VisionLanguageModel(
        encoder or Llama4Vision(16, 4, width=32, layers=2, heads=2, hidden=128),
        partial(EarlyFusion, **fusion),
        BackboneConfig(**(config | {"balance": balance} | changes)),
        TOKENIZER,
    )
    randomize(model)
    if model.backbone.config.tied:
        assert model.backbone.head.weight is model.backbone.embed.weight
    return model.eval()


def question() -> Prompt:
    """Two images in one row."""
    noise = pixels(2).permute(0, 2, 3, 1).numpy()
    first, second = (Image(PILImage.fromarray(np.ascontiguousarray(tile))) for tile in noise)
    return Prompt([Turn("user", ["first ", first, " and then ", second, ": what has changed?"])])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"balance": "bias", "moe_every": 2, "tied": True},
        {"balance": "none", "experts": 0, "chunk": None, "rope_scaling": None},
        {"top_k": 2, "nope_every": 0, "qk_norm": False},
    ],
    ids=["mixtures", "tied, unmoved bias", "dense", "two experts"],
)
@torch.no_grad()
def test_a_model_trained_here_goes_to_transformers(changes, tmp_path):
    """Guards against an export that loads, and then sees or says something else."""
    ours = trained(**changes)
    save_model(ours, tmp_path / "model.safetensors")
    export_hf(tmp_path / "model.safetensors", tmp_path / "theirs")
    theirs = transformers.Llama4ForConditionalGeneration
    theirs, report = theirs.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.image_token_index == TOKENIZER.special("<|patch|>")
    assert theirs.config.text_config.eos_token_id == list(TOKENIZER.stop_ids)

    batch = collate([ours.prompts.encode(question(), reply=True)])
    images = {"pixel_values": ours.encoder.normalize(batch.tiles)}
    expected = theirs.eval()(batch.tokens, **images).logits
    torch.testing.assert_close(ours(batch).logits, expected, atol=LOGITS, rtol=0)
    replies = their_greedy(theirs, batch.tokens, 12, **images)
    assert ours.generate_ids(batch, max_tokens=len(replies)) == [replies]

    again = load_hf(tmp_path / "theirs")
    assert again.tokenizer is not None
    assert again.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert again.generate([question()], max_tokens=4) == ours.generate([question()], max_tokens=4)


def test_the_exported_tokenizer_is_the_same(tmp_path):
    """Guards against a tokenizer file that transformers ignores, or reads in another way."""
    save_model(trained(), tmp_path / "model.safetensors")
    export_hf(tmp_path / "model.safetensors", tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "How many bars are there? They're 12345 — naïve."
    assert theirs(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text)
    assert theirs.convert_tokens_to_ids("<|patch|>") == TOKENIZER.special("<|patch|>")


def test_what_transformers_cannot_express_is_named(tmp_path):
    """Guards against an export that loads and computes something else."""
    path = tmp_path / "model.safetensors"
    refusals = {
        r"the encoder is encoders\.patches\.Patches": {"encoder": Patches(16, 4, 32)},
        r"fusion\.projector is \"linear\", must be \"mlp\"": {"projector": "linear"},
        r"fusion\.bidirectional is true, must be false": {"bidirectional": True},
        r"encoder\.hidden is 128, must be 512": {"shuffle": 4},
        r"router_score is \"softmax\".*; backbone\.router_placement is \"output\"": {
            "router_score": "softmax",
            "router_placement": "output",
        },
        r"shared_expert is false, must be true": {"shared_expert": False},
    }
    for says, changes in refusals.items():
        save_model(trained(**changes), path)
        with pytest.raises(UserError, match=rf"model\.safetensors: .*cannot express it: .*{says}"):
            export_hf(path, tmp_path / "theirs")
    save_model(trained(balance="bias"), path)
    state = load_file(path)
    biased = trained(balance="bias")
    biased.backbone.layers[2].ffn.balance_bias[1] = 0.02
    assert any(name.endswith("balance_bias") for name in state)
    save_model(biased, path)
    with pytest.raises(UserError, match=r"layers\.2\.ffn\.balance_bias is not zero.*balance none"):
        export_hf(path, tmp_path / "theirs")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@torch.no_grad()
def test_the_baseline_trained_here_goes_to_transformers(tmp_path):
    """Guards against adapters of other sizes than the decoder's layers, which share theirs."""
    plain = {"experts": 0, "nope_every": 0, "chunk": None, "qk_norm": False, "input_only": 8}
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    config = BackboneConfig(vocab_size=1024, width=64, layers=3, dense_hidden=48, **sizes, **plain)
    tower = {"tile_size": 16, "patch_size": 4, "hidden": 32, "layers": 2, "global_layers": 1}
    ours = VisionLanguageModel(
        MllamaVision(**tower, heads=2, ffn_hidden=48, intermediate_layers=[0]),
        lambda *widths: CrossAttention(*widths, layers=[0, 2], hidden=48, **sizes),
        config,
        TOKENIZER,
    ).eval()
    randomize(ours)
    save_model(ours, tmp_path / "model.safetensors")
    export_hf(tmp_path / "model.safetensors", tmp_path / "theirs")
    theirs = transformers.MllamaForConditionalGeneration
    theirs, report = theirs.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.text_config.cross_attention_layers == [0, 3]
    assert theirs.config.image_token_index == TOKENIZER.special("<|image|>")
    torch.testing.assert_close(
        ours(tokens=ids()).logits, theirs.eval()(ids()).logits, atol=LOGITS, rtol=0
    )

    other = VisionLanguageModel(
        MllamaVision(**tower, heads=2, ffn_hidden=48, intermediate_layers=[0]),
        lambda *widths: CrossAttention(*widths, layers=[0, 2], hidden=40, **sizes),
        config,
        TOKENIZER,
    )
    save_model(other, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot express it: fusion\.hidden is 40, must be 48"):
        export_hf(tmp_path / "model.safetensors", tmp_path / "no")


def test_a_language_model_trained_here_finds_its_class(tmp_path):
    """Guards against text models that only a multimodal class could hold."""
    plain = {"experts": 0, "nope_every": 0, "chunk": None, "qk_norm": False, "balance": "none"}
    for changes, name in ((plain, "LlamaForCausalLM"), ({}, "Llama4ForCausalLM")):
        config = BackboneConfig(**({"vocab_size": VOCABULARY, "balance": "loss"} | changes))
        ours = VisionLanguageModel(None, None, config, None).eval()
        save_model(ours, tmp_path / f"{name}.safetensors")
        export_hf(tmp_path / f"{name}.safetensors", tmp_path / name)
        theirs = getattr(transformers, name).from_pretrained(tmp_path / name).eval()
        logits = ours(tokens=ids()).logits
        torch.testing.assert_close(logits, theirs(ids()).logits, atol=LOGITS, rtol=0)


# --- The commands ---------------------------------------------------------------------------------


def test_the_commands(tmp_path, capsys):
    """Guards against flags that are parsed and never passed on."""
    toy("llama4_text").save_pretrained(tmp_path / "theirs")
    argv = ["import-hf", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--dtype", "bfloat16"]
    assert cli.main(argv) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    argv = ["export-hf", str(tmp_path / "ours"), str(tmp_path / "back")]
    assert cli.main([*argv, "--dtype", "float16", "--shard-size", "0.0001"]) == 0
    assert "files of weights" in capsys.readouterr().out
    assert {tensor.dtype for tensor in tensors(tmp_path / "back").values()} == {torch.float16}
    assert cli.main(argv) == 1
    assert "not empty: name a new directory" in capsys.readouterr().err
    assert cli.main(["ask", "--checkpoint", str(tmp_path / "ours"), "what?"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "no tokenizer" in error
    with pytest.raises(SystemExit):
        cli.main([*argv, "--shard-size", "-1"])
    assert "must be a number of GB above 0, got '-1'" in capsys.readouterr().err


# The imports leave a high-water mark above what is measured, so it is reset; RUSAGE's cannot be.
MEASURE = """
import re, sys
from functools import partial
from pathlib import Path
from sandbox.checkpoint import {command}
import safetensors.torch, torch
torch.ones(64, 64) @ torch.ones(64, 64)
Path("/proc/self/clear_refs").write_text("5")
mark = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = mark()
kept = {command}(*sys.argv[1:])
print(mark() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The size in MB of a toy in at least four shards, and where it lies in both formats."""
    place = tmp_path_factory.mktemp("large")
    big = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 16}
    theirs = toy("llama4_text", **big, intermediate_size_mlp=512, num_hidden_layers=4)
    theirs.save_pretrained(place / "theirs", max_shard_size="60MB")
    assert len(list((place / "theirs").glob("*.safetensors"))) >= 4
    import_hf(place / "theirs", place / "ours.safetensors")
    return sum(p.nbytes for p in theirs.parameters()) / 1e6, place


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("command", "paths"),
    [
        ("load_hf", ["theirs"]),
        ("import_hf", ["theirs", "again.safetensors"]),
        ("export_hf", ["ours.safetensors", "back"]),
    ],
)
def test_memory_stays_near_the_model_and_one_shard(command, paths, large):
    """Guards against an import that holds the model twice, too much for the large ones."""
    megabytes, place = large
    script = [sys.executable, "-c", MEASURE.format(command=command)]
    done = subprocess.run(
        [*script, *(str(place / path) for path in paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert 0.9 * megabytes < int(done.stdout) * 1024 / 1e6 < megabytes + 60 + 30
