"""Where training starts from: the weights of a checkpoint, all of them or those of some parts."""

import json
from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.checkpoint import differences, load_hf, load_model, load_weights, read_checkpoint
from sandbox.errors import UserError
from sandbox.model import VisionLanguageModel
from sandbox.runs import find_weights

PARTS = ("encoder", "fusion", "backbone")
# What may differ: an encoder at another resolution has its position table interpolated.
RESOLUTION = {"tile_size", "encoder_grid"}


def start_from(model: VisionLanguageModel, source: str | Mapping[str, str] | None) -> None:
    """Give the model the weights of earlier runs.

    Args:
        model: whose weights to replace.
        source: a checkpoint of the same architecture, or by part (``encoder``, ``fusion``,
            ``backbone``) a checkpoint that holds it, of whatever objective. A run directory stands
            for its checkpoint.

    Raises:
        UserError: there is no such checkpoint or part, or it is of another configuration.
    """
    if source is None:
        return
    if isinstance(source, str):
        path = find_weights(source)
        load_weights(model, read_checkpoint(path)[1], source=str(path))
        return
    for part, where in source.items():
        if part not in PARTS or getattr(model, part) is None:
            parts = ", ".join(name for name in PARTS if getattr(model, name) is not None)
            raise UserError(f"init_from: the model has no part '{part}' (parts: {parts})")
        _load_part(model, part, find_weights(where))


def _load_part(model: VisionLanguageModel, part: str, path: Path) -> None:
    description, tensors = read_checkpoint(path)
    there = description["model"].get(part)
    if there is None:
        held = ", ".join(name for name in PARTS if description["model"].get(name))
        raise UserError(f"init_from.{part}: checkpoint {path} holds no {part} (it has: {held})")
    here: Any = model.describe()[part]
    own: Any = getattr(model, part)
    if part != "backbone":
        arguments = _with_gained(there["init_args"], here["init_args"], type(own))
        there = there | {"init_args": arguments}
    # Through JSON, as a checkpoint may have been: it knows no tuples.
    there, here = json.loads(json.dumps([there, here]))
    if found := _unlike(there, here):
        raise UserError(f"init_from.{part}: checkpoint {path} is of another configuration: {found}")
    state = _below(tensors, part)
    if part == "encoder":
        try:
            state = own.adapt(state)
        except ValueError as error:
            raise UserError(f"init_from.{part}: checkpoint {path}: {error}") from None
    if found := differences(own.state_dict(), state):
        raise UserError(f"init_from.{part}: checkpoint {path} is of another configuration: {found}")
    own.load_state_dict(state)


def load_reader(path: str) -> VisionLanguageModel:
    """The language model of a checkpoint of ours, or of a transformers directory.

    Raises:
        UserError: there is none, or it comes without a tokenizer.
    """
    theirs = (Path(path) / "config.json").is_file()
    model = load_hf(path) if theirs else load_model(find_weights(path))
    if model.tokenizer is None:
        raise UserError(
            f"language model {path} has no tokenizer with Llama 4's special tokens, so no prompt "
            "can be written for it: import one that has"
        )
    return model


def _below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a part, by their names inside it."""
    prefix = f"{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _with_gained(there: Mapping[str, Any], here: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Recorded arguments, and the defaults of those that their class has gained since."""
    parameters = signature(kind).parameters
    gained = {name: parameters[name].default for name in here.keys() - there.keys()}
    return {**there, **{k: v for k, v in gained.items() if v is not Parameter.empty}}


def _unlike(there: Any, here: Any, path: str = "") -> str:
    """The first place in which two descriptions differ, resolution aside; empty if none does."""
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return "" if there == here else f"{path} is {there!r} there, {here!r} here"
    for key in sorted(there.keys() | here.keys()):
        if key in RESOLUTION:
            continue
        name = f"{path}.{key}" if path else key
        if found := _unlike(there.get(key), here.get(key), name):
            return found
    return ""
