"""The files of a transformers checkpoint: a configuration, and tensors in one file or in shards."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion.layout import PATCH
from sandbox.errors import UserError
from sandbox.tokenizer import BEGIN, END, Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
LLAMA4_PATCH = 200_092  # the image_token_index that a configuration leaves out
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_config(directory: Path) -> dict[str, Any]:
    """What ``config.json`` of a checkpoint says.

    Raises:
        UserError: it is missing or damaged.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; a transformers checkpoint is one")
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: no {CONFIG} in it, so not a transformers checkpoint")
    return _read_json(directory / CONFIG)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, in the order of its shards.

    They are views of the mapped files: nothing is read before it is used, and a shard leaves memory
    with the last of its tensors.

    Raises:
        UserError: a file is missing or damaged, or holds what are no plain numbers.
    """
    tensors: dict[str, Tensor] = {}
    for path in _shards(directory):
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            cause = str(error).splitlines()[0]
            raise UserError(f"{path}: damaged or cut short ({cause})") from None
        for name, tensor in found.items():
            if tensor.dtype not in PLAIN:
                raise UserError(
                    f"{path}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}: "
                    "quantised weights have to be dequantised first"
                )
        # Old files hold the rotary frequencies, which the configuration gives.
        tensors |= {n: x for n, x in found.items() if not n.endswith("rotary_emb.inv_freq")}
    return tensors


def _shards(directory: Path) -> list[Path]:
    """The files that hold the tensors."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin*"))
        if pickled:
            raise UserError(
                f"{directory}: {pickled[0]} is pickled, and could run any code when read: load it "
                f"with transformers where you trust it, and save_pretrained writes {WEIGHTS}"
            )
        raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} in it")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: damaged, it has no weight_map")
    paths = [directory / name for name in sorted(set(names.values()))]
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        raise UserError(f"{directory}: {len(gone)} of {len(paths)} shards missing, e.g. {gone[0]}")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, it must hold keys and values")
    return content


def read_tokenizer(
    directory: Path, config: Mapping[str, Any], backbone: Mapping[str, Any]
) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a checkpoint if our prompts can be written with it, and else why not.

    It may have fewer tokens than the embedding has rows: those of Llama 4 that it leaves out are
    reserved, and no prompt needs them.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return None, f"{directory} has no {TOKENIZER}"
    try:
        tokenizer = Tokenizer.load(path)
        patch = tokenizer.special(PATCH)
    except UserError as error:
        return None, str(error)
    size = backbone["vocab_size"] + backbone["input_only"]
    if tokenizer.vocab_size > size:
        return None, f"{path} has {tokenizer.vocab_size} tokens, but the embedding only {size}"
    index = config.get("image_token_index", LLAMA4_PATCH)
    if config["model_type"] == "llama4" and index != patch:
        return None, f"{PATCH} is {patch} in {path}, but image_token_index is {index}"
    return tokenizer, ""


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A directory to write into, which appears under its name when all is written, or never.

    Raises:
        UserError: there is something at the name already, or it cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty: name a new directory")
    place = directory.resolve()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        if place.exists():
            place.rmdir()
        partial.rename(place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} could not be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    directory: Path, groups: Iterable[Mapping[str, Tensor]], *, shard_bytes: int
) -> int:
    """Write tensors as transformers does: in one file, or in shards with an index.

    Args:
        directory: where to.
        groups: tensors by name; a group stays together, and is dropped once it is written.
        shard_bytes: the size that a shard may have, unless a single group is larger.

    Returns:
        The number of shards.
    """
    files: list[list[str]] = []  # the names in each shard
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, directory / f"{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for group in groups:
        more = sum(tensor.nbytes for tensor in group.values())
        if held and size + more > shard_bytes:
            flush()
            size = 0
        held |= {name: tensor.contiguous() for name, tensor in group.items()}
        size, total = size + more, total + more
    flush()
    if len(files) == 1:
        (directory / "0").rename(directory / WEIGHTS)
        return 1
    weight_map = dict[str, str]()
    for number, names in enumerate(files):
        shard = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (directory / str(number)).rename(directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(files)


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer that ``AutoTokenizer`` loads."""
    (directory / TOKENIZER).write_text(tokenizer.to_json())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    write_json(directory / "tokenizer_config.json", about)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write keys and values as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n")
