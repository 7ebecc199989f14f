"""Checks of a file that a person wrote: each error names the file, the key and what to do."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sandbox.errors import UserError

IN_WORDS = {str: "a text", list: "a list", dict: "a mapping", bool: "true or false"}


def read_yaml(file: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: it is missing or no YAML.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None


def fields(
    where: str, value: Any, kinds: Mapping[str, type], required: Iterable[str]
) -> dict[str, Any]:
    """A mapping with known keys, each of its type, and the ``required`` ones among them.

    Raises:
        UserError: a key is unknown, missing or of another type.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping of {', '.join(kinds)}")
    for key, content in value.items():
        known(where, str(key), kinds, "key")
        if not isinstance(content, kinds[key]):
            raise UserError(f"{where}: '{key}' must be {IN_WORDS[kinds[key]]}, got {content!r}")
    if missing := [key for key in required if key not in value]:
        raise UserError(f"{where}: '{missing[0]}' is missing")
    return value


def named(
    where: str, value: Mapping[Any, Any], pattern: str, *, empty: bool = False
) -> list[tuple[str, Any]]:
    """The entries of a mapping whose keys are names that match the ``pattern``.

    Raises:
        UserError: one does not, or the mapping is empty and may not be.
    """
    if not value and not empty:
        raise UserError(f"{where}: there is none")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            raise UserError(f"{where}: {name!r} is no name that can be used here")
    return list(value.items())


def seed_list(where: str, value: list[Any]) -> tuple[int, ...]:
    """The seeds of a file.

    Raises:
        UserError: there is none, one stands twice, or one is no whole number from 0 on.
    """
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in value)
    if not value or not whole or min(value) < 0 or len(set(value)) < len(value):
        raise UserError(f"{where}: must be different whole numbers from 0 on, got {value!r}")
    return tuple(value)


def known(where: str, name: str, valid: Collection[str], what: str) -> None:
    """Accept one of the valid names.

    Raises:
        UserError: it is none; the message tells the nearest.
    """
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(valid)}"
        raise UserError(f"{where}: unknown {what} '{name}'; {hint}")
