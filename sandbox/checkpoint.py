"""Checkpoints that describe themselves, and their way back to a model.

Two containers carry the same description: a ``.safetensors`` file (weights alone, to keep and
share) and Lightning's ``.ckpt`` (with optimizer and progress, to resume). Neither is ever unpickled
into classes. Checkpoints of transformers are imported and exported tensor by tensor.
"""

import json
import platform
import subprocess
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from encoders.base import VisionEncoder
from fusion.base import Fusion
from sandbox.backbone.config import BackboneConfig
from sandbox.errors import UserError
from sandbox.huggingface import files
from sandbox.huggingface.configure import configure
from sandbox.huggingface.describe import describe
from sandbox.huggingface.names import has_head, layout_of, plan, to_ours, to_theirs
from sandbox.meta import without_memory
from sandbox.model import VisionLanguageModel
from sandbox.runs import WEIGHTS
from sandbox.tokenizer import Tokenizer

KEY = "early_fusion_sandbox"  # where the description stands in either container
PREFIX = "model."  # of the model's tensors in a LightningModule's state dict


def provenance() -> dict[str, str]:
    """Where a result comes from: the code's commit and the versions it ran on."""
    packages = ("early-fusion-sandbox", "torch", "lightning", "tokenizers", "pillow", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in packages},
    }


def _commit() -> str:
    """The repository's commit, marked when the tree differs from it; 'unknown' outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def build_model(description: Mapping[str, Any]) -> VisionLanguageModel:
    """An untrained model of the described architecture (see ``VisionLanguageModel.describe``)."""
    config = BackboneConfig.of(description["backbone"])
    tokenizer = _tokenizer(description)
    if description["encoder"] is None:
        return VisionLanguageModel(None, None, config, tokenizer)
    encoder = _component(description["encoder"], VisionEncoder)
    fusion = _component(description["fusion"], Fusion)
    max_tiles = description.get("max_tiles", 1)  # absent before images were tiled
    # A fusion's description holds all its arguments, the three widths among them.
    return VisionLanguageModel(
        encoder(), lambda *_: fusion(), config, tokenizer, max_tiles=max_tiles
    )


def _tokenizer(description: Mapping[str, Any]) -> Tokenizer | None:
    text = description["tokenizer"]
    return None if text is None else Tokenizer.from_json(text)


def _component(part: Mapping[str, Any], contract: type) -> Any:
    """The class at ``part["class_path"]``, its arguments bound."""
    module, _, name = part["class_path"].rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"the checkpoint needs {part['class_path']}, which is not there") from None
    if not (isinstance(found, type) and issubclass(found, contract)):
        raise UserError(f"the checkpoint names {part['class_path']}, no {contract.__name__}")
    return partial(found, **part["init_args"])


def save_model(model: VisionLanguageModel, path: str | Path, **facts: Any) -> None:
    """Write weights and description to a safetensors file; ``facts`` (seed, data, ...) join it.

    Raises:
        UserError: it could not be written; what was at ``path`` is untouched.
    """
    description = {"model": model.describe(), "provenance": provenance(), **facts}
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    if model.backbone.config.tied:
        del tensors["backbone.head.weight"]  # the embedding's: safetensors refuses shared memory
    write_safetensors(tensors, description, Path(path))


def write_safetensors(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], path: Path
) -> None:
    """Write tensors and what they are to a file, or leave what was there untouched.

    Raises:
        UserError: it could not be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(tensors), partial, metadata={KEY: json.dumps(description)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error})") from None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the model's tensors of either container.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            description = json.loads(metadata[KEY]) if KEY in metadata else None
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            description = content.get(KEY)
            tensors = model_tensors(content.get("state_dict", {}))
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path}: damaged or cut short ({cause})") from None
    except Exception as error:  # torch raises pickle.UnpicklingError for anything unexpected
        raise UserError(
            f"checkpoint {path}: not a safe checkpoint ({type(error).__name__})"
        ) from None
    if description is None:
        raise UserError(f"checkpoint {path}: not one of this project (it has no '{KEY}' entry)")
    return description, tensors


def model_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors in the state of a LightningModule that holds it as ``model``."""
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }


def load_model(path: str | Path) -> VisionLanguageModel:
    """The model of a checkpoint, on the CPU and in eval mode.

    Raises:
        UserError: see ``read_checkpoint`` and ``check_weights``.
    """
    description, tensors = read_checkpoint(path)
    if Path(path).suffix == ".safetensors":  # views of the file, which the model should not need
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model = _skeleton(description["model"])
    check_weights(model, tensors, source=str(path))
    return _adopt(model, tensors)


def _skeleton(description: Mapping[str, Any]) -> VisionLanguageModel:
    """The described model, to be given its weights.

    It is built without memory, unless a part computes with its tensors at once, or draws up a table
    that no checkpoint holds and that would be lost.
    """
    try:
        with without_memory():
            model = build_model(description)
    except RuntimeError:
        return build_model(description)
    held = model.state_dict()
    tables = (buffer for name, buffer in model.named_buffers() if name not in held)
    return build_model(description) if any(table.is_meta for table in tables) else model


def _adopt(model: VisionLanguageModel, tensors: Mapping[str, Tensor]) -> VisionLanguageModel:
    """The model with these very tensors as its weights, in eval mode."""
    model.load_state_dict(_with_head(model, tensors), assign=True)
    if model.backbone.config.tied:  # two parameters over one tensor would part when they train
        model.backbone.head.weight = model.backbone.embed.weight
    return model.eval()


def load_weights(model: VisionLanguageModel, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into the model, all or none.

    Raises:
        UserError: see ``check_weights``.
    """
    check_weights(model, tensors, source=source)
    model.load_state_dict(_with_head(model, tensors))


def _with_head(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors and, where a checkpoint leaves it to the embedding, the head."""
    tensors = dict(tensors)
    tied = isinstance(model, VisionLanguageModel) and model.backbone.config.tied
    if tied and "backbone.embed.weight" in tensors:
        tensors.setdefault("backbone.head.weight", tensors["backbone.embed.weight"])
    return tensors


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse tensors that are not this model's.

    Raises:
        UserError: tensors are missing, unexpected or misshapen; the message names them.
    """
    if found := differences(model.state_dict(), _with_head(model, tensors)):
        raise UserError(f"checkpoint {source} is of another configuration: {found}")


def differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """How tensors differ from one's own in names and shapes; empty if they do not."""
    misshapen = [
        f"{name} ({'x'.join(map(str, tensors[name].shape))} there, "
        f"{'x'.join(map(str, own[name].shape))} here)"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": misshapen,
    }
    found = [f"{len(names)} {what}, e.g. {names[0]}" for what, names in problems.items() if names]
    return "; ".join(found)


# --- Checkpoints of transformers ------------------------------------------------------------------


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """The type of a name; None to keep what is there."""
    if name is None or name == "keep":
        return None
    return getattr(torch, name) if isinstance(name, str) else name


class Imported(NamedTuple):
    """A model from a checkpoint of transformers, and where it comes from.

    Attributes:
        model: on the CPU and in eval mode.
        source: its configuration there and the layout of its tensors' names, for the way back.
        note: why it has no tokenizer; empty if it has one.
    """

    model: VisionLanguageModel
    source: dict[str, Any]
    note: str


def load_hf(directory: str | Path, dtype: torch.dtype | str | None = None) -> VisionLanguageModel:
    """The model of a transformers checkpoint, on the CPU and in eval mode.

    Its logits are transformers', with one exception: in Llama 3.2 Vision, text before an image does
    not see it, as in Meta's code (see ``hf_compat`` of ``fusion.cross_attention``).

    Args:
        directory: holds ``config.json``, and safetensors in one file or in shards. From a
            ``tokenizer.json`` with Llama 4's special tokens the model has a tokenizer.
        dtype: of its weights, or the name of one; None, or ``"keep"``, keeps each tensor's.

    Raises:
        UserError: the directory cannot be read, is of a model that ours cannot express, or its
            tensors do not fit its configuration.
    """
    return _import(Path(directory), dtype).model


def import_hf(
    directory: str | Path, out: str | Path, dtype: torch.dtype | str | None = None
) -> tuple[Path, str]:
    """Turn a transformers checkpoint into one of ours.

    Args:
        directory: see ``load_hf``.
        out: a file whose name ends in ``.safetensors``, or a directory for ``model.safetensors``.
        dtype: see ``load_hf``.

    Returns:
        The file, and why it has no tokenizer (empty if it has one).

    Raises:
        UserError: see ``load_hf``; or the file exists or cannot be written.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        path = path / WEIGHTS
    if path.exists():
        raise UserError(f"{path} exists already: name another file")
    model, source, note = _import(Path(directory), dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path, huggingface=source)
    return path, note


def _import(directory: Path, dtype: torch.dtype | str | None) -> Imported:
    config = files.read_config(directory)
    tensors = files.read_tensors(directory)
    model_type = str(config.get("model_type"))
    layout = layout_of(model_type, tensors)
    try:
        description = describe(config, has_head=has_head(model_type, layout, tensors))
        tokenizer, note = files.read_tokenizer(directory, config, description["backbone"])
        model = _skeleton(description | {"tokenizer": tokenizer and tokenizer.to_json()})
    except ValueError as error:  # of ours or of a part
        raise UserError(f"{directory / files.CONFIG}: {error}") from None
    transfers = plan(model_type, description, layout)
    own = model.state_dict()
    expected = {n: x for t in transfers for n, x in t.to_theirs(own[t.ours]).items()}
    if found := differences(expected, tensors):
        raise UserError(f"{directory}: the tensors do not fit {files.CONFIG}: {found}")
    weights = to_ours(transfers, tensors, _dtype(dtype))
    return Imported(_adopt(model, weights), {"config": config, "layout": layout}, note)


def export_hf(
    checkpoint: str | Path,
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    shard_gigabytes: float = 5.0,
) -> int:
    """Turn a checkpoint of ours into one that transformers loads.

    The bias that evens expert load (``backbone.balance: bias``) has no counterpart in transformers.
    It is left out where it is zero, and refused elsewhere, since experts would be chosen otherwise.

    Args:
        checkpoint: a ``.safetensors`` file or a ``.ckpt``.
        directory: a new one.
        dtype: see ``load_hf``.
        shard_gigabytes: how large a file may be.

    Returns:
        The number of shards.

    Raises:
        UserError: the checkpoint cannot be read, transformers cannot express it, or the directory
            is not empty or cannot be written.
    """
    description, tensors = read_checkpoint(checkpoint)
    check_weights(_skeleton(description["model"]), tensors, source=str(checkpoint))
    source = description.get("huggingface", {})
    tokenizer = _tokenizer(description["model"])
    wanted = _dtype(dtype)
    stored = wanted or tensors["backbone.embed.weight"].dtype
    try:
        config = configure(
            description["model"],
            tokenizer=tokenizer,
            source=source.get("config"),
            dtype=str(stored).removeprefix("torch."),
        )
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    transfers = plan(config["model_type"], description["model"], source.get("layout", 0))
    biased = [t.ours for t in transfers if not t.theirs and tensors[t.ours].any()]
    if biased:
        raise UserError(
            f"{checkpoint}: {biased[0]} is not zero, and transformers' router has no such bias: "
            "train on with backbone.balance none or loss, and without the bias"
        )

    with files.appearing(Path(directory)) as partial:
        files.write_json(partial / files.CONFIG, config)
        if tokenizer is not None:
            files.write_tokenizer(partial, tokenizer)
        groups = to_theirs(transfers, tensors, wanted)
        return files.write_tensors(partial, groups, shard_bytes=int(shard_gigabytes * 1e9))
