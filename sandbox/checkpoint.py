"""Checkpoints that describe themselves, and their way back to a model.

Two containers carry the same description: a ``.safetensors`` file (weights alone, to keep and
share) and Lightning's ``.ckpt`` (with optimizer and progress, to resume). Neither is ever unpickled
into classes.
"""

import json
import platform
import subprocess
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from encoders.base import VisionEncoder
from fusion.base import Fusion
from sandbox.backbone.config import BackboneConfig, RopeScaling
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
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
    encoder = _component(description["encoder"], VisionEncoder)
    fusion = _component(description["fusion"], Fusion)
    backbone = dict(description["backbone"])
    if backbone["rope_scaling"] is not None:
        backbone["rope_scaling"] = RopeScaling(**backbone["rope_scaling"])
    # A fusion's description holds all its arguments, the three widths among them.
    return VisionLanguageModel(
        encoder(),
        lambda *_: fusion(),
        BackboneConfig(**backbone),
        Tokenizer.from_json(description["tokenizer"]),
    )


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
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={KEY: json.dumps(description)})
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
    model = build_model(description["model"])
    load_weights(model, tensors, source=str(path))
    return model.eval()


def load_weights(model: VisionLanguageModel, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into the model, all or none.

    Raises:
        UserError: see ``check_weights``.
    """
    tensors = dict(tensors)
    if model.backbone.config.tied and "backbone.embed.weight" in tensors:
        tensors.setdefault("backbone.head.weight", tensors["backbone.embed.weight"])
    check_weights(model, tensors, source=source)
    model.load_state_dict(tensors)


def check_weights(
    model: VisionLanguageModel, tensors: Mapping[str, Tensor], *, source: str
) -> None:
    """Refuse tensors that are not this model's.

    Raises:
        UserError: tensors are missing, unexpected or misshapen; the message names them.
    """
    own = model.state_dict()
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
    if found:
        raise UserError(f"checkpoint {source} is of another configuration: {'; '.join(found)}")
