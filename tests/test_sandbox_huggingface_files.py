"""Directories of transformers checkpoints: what is missing or damaged in them is said."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sandbox.backbone.config import BackboneConfig
from sandbox.checkpoint import export_hf, import_hf, load_hf, save_model
from sandbox.errors import UserError
from sandbox.huggingface import files
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00004.safetensors"


@pytest.fixture
def directory(tmp_path):
    """A small checkpoint of transformers in four shards."""
    config = BackboneConfig(
        vocab_size=40, width=16, layers=2, heads=2, head_dim=8, expert_hidden=8, balance="none"
    )
    save_model(VisionLanguageModel(None, None, config, None), tmp_path / "model.safetensors")
    shards = export_hf(tmp_path / "model.safetensors", tmp_path / "theirs", shard_gigabytes=1e-5)
    assert shards == 4
    return tmp_path / "theirs"


def test_shards_are_those_of_the_index(directory):
    """Guards against shards beyond the limit, and an index that does not lead to the tensors."""
    index = json.loads((directory / INDEX).read_text())
    held = {}
    for path in directory.glob("*.safetensors"):
        names = load_file(path)
        assert sum(tensor.nbytes for tensor in names.values()) <= 10_000
        held |= dict.fromkeys(names, path.name)
        held_bytes = sum(tensor.nbytes for tensor in names.values())
        index["metadata"]["total_size"] -= held_bytes
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        FIRST,
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        INDEX,
    ]


def damaged_tensor(directory):
    path = directory / FIRST
    path.write_bytes(path.read_bytes()[:-40])


def without(pattern):
    """A mutilation: the files of a pattern are gone."""

    def removed(directory):
        for path in directory.glob(pattern):
            path.unlink()

    return removed


def replaced(name, content):
    """A mutilation: a file holds something else."""
    return lambda directory: (directory / name).write_text(content)


def tensors(change):
    """A mutilation: the tensors of the first shard are changed."""

    def changed(directory):
        held = load_file(directory / FIRST)
        change(held)
        save_file(held, directory / FIRST)

    return changed


def pickled(directory):
    without("model*")(directory)
    (directory / "pytorch_model.bin").touch()


EMBED = "model.embed_tokens.weight"
FAULTS = {
    "no configuration": (without("config.json"), "no config.json in it"),
    "no JSON": (replaced("config.json", "{"), "config.json: damaged"),
    "a list": (replaced("config.json", "[]"), "config.json: damaged, it must hold keys"),
    "another model": (
        replaced("config.json", '{"model_type": "bert"}'),
        'config.json: model_type = "bert", not one of llama, llama4_text, llama4, mllama',
    ),
    "no weights": (without("model*"), f"neither model.safetensors nor {INDEX} in it"),
    "pickled": (pickled, "pytorch_model.bin is pickled, and could run any code when read"),
    "a shard missing": (
        without("model-00002*"),
        "1 of 4 shards missing, e.g. model-00002-of-00004.safetensors",
    ),
    "no map": (replaced(INDEX, "{}"), f"{INDEX}: damaged, it has no weight_map"),
    "cut short": (damaged_tensor, f"{FIRST}: damaged or cut short"),
    "missing": (
        tensors(lambda held: held.pop(EMBED)),
        f"the tensors do not fit config.json: 1 missing, e.g. {EMBED}",
    ),
    "unexpected": (
        tensors(lambda held: held.update(extra=torch.ones(2), more=torch.ones(1))),
        "the tensors do not fit config.json: 2 unexpected, e.g. extra",
    ),
    "misshapen": (
        tensors(lambda held: held.update({EMBED: torch.ones(40, 17)})),
        f"1 of another shape, e.g. {EMBED} (40x17 there, 40x16 here)",
    ),
    "quantised": (
        tensors(lambda held: held.update({EMBED: held[EMBED].to(torch.float8_e4m3fn)})),
        f"{EMBED} is stored as float8_e4m3fn: quantised weights",
    ),
}


@pytest.mark.parametrize(("mutilate", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_one_line_that_names_the_file(mutilate, says, directory):
    """Guards against tracebacks, half-filled models, and pickles that are read."""
    mutilate(directory)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load_hf(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError):
        import_hf(directory, directory.parent / "out" / "model.safetensors")
    assert not (directory.parent / "out").exists()


def test_a_path_that_is_no_directory():
    """Guards against the name of a model on the Hub, which nothing here downloads."""
    with pytest.raises(UserError, match="meta-llama/Llama-4: no such directory"):
        load_hf("meta-llama/Llama-4")


def test_nothing_is_overwritten_and_nothing_is_left_half_written(directory, monkeypatch):
    """Guards against an export that ends in the middle and looks whole."""
    ours = directory.parent / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.safetensors exists already: name another file"):
        import_hf(directory, directory.parent)
    with pytest.raises(UserError, match="theirs exists and is not empty: name a new directory"):
        export_hf(ours, directory)
    before = sorted(directory.parent.iterdir())
    written = iter([None, OSError(28, "No space left on device")])

    def full_disk(tensors, path, metadata):
        if error := next(written):
            raise error

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(UserError, match=r"new could not be written \(.*No space left"):
        export_hf(ours, directory.parent / "new", shard_gigabytes=1e-5)
    assert sorted(directory.parent.iterdir()) == before


def test_an_empty_directory_may_be_filled(directory):
    """Guards against scripts that make the directory first."""
    (directory.parent / "empty").mkdir()
    export_hf(directory.parent / "model.safetensors", directory.parent / "empty" / ".." / "empty")
    assert load_hf(directory.parent / "empty").backbone.config.layers == 2


@pytest.mark.parametrize(
    ("rows", "index", "says"),
    [
        (1024, 1023, ""),
        (1100, 1023, ""),
        (1000, 1023, "has 1024 tokens, but the embedding only 1000"),
        (1024, 90, "<|patch|> is 1023 in"),
    ],
)
def test_a_tokenizer_has_to_fit(rows, index, says, tmp_path):
    """Guards against ids beyond the embedding, and images on the tokens of something else."""
    tokenizer = Tokenizer.load()
    assert tokenizer.special("<|patch|>") == 1023
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    config = {"model_type": "llama4", "image_token_index": index}
    found, note = files.read_tokenizer(tmp_path, config, {"vocab_size": rows, "input_only": 0})
    assert (found is None) == bool(says)
    assert says in note and bool(note) == bool(says)


def test_a_tokenizer_without_our_special_tokens_is_left_out(directory):
    """Guards against a Llama 3 tokenizer whose headers prompts would spell out."""
    tokenizer = json.loads(Tokenizer.load().to_json())
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("header_start", "start_header_id")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = directory.parent / "imported.safetensors"
    _, note = import_hf(directory, out)
    assert "no special token '<|header_start|>'" in note
    assert load_hf(directory).tokenizer is None
