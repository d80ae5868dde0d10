"""What is put into the data before it is validated: ``a.b.c=value`` from the command line, and whole paths.

Paths are relative to the file, or the command line, that names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftune.config.messages import shown
from difftune.config.yaml12 import parse_value
from difftune.preferences import SUFFIXES as PREFERENCE_SUFFIXES
from difftune.prompts import SUFFIXES
from difftune.types import UserError

_SHORTHAND = {"model": "id", "prompts": "source", "reward": "name", "algorithm": "name"}
"""Sections that may be a bare value, and the key under which it then stands."""


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put ``a.b.c=value`` into ``data``, in place."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"override: got {override!r}, expected key=value, e.g. train.epochs=10")
    value = parse_value(text, f"override {override!r}")
    value = with_absolute_paths({path[0]: _nested(path[1:], value)}, Path.cwd())[path[0]]
    if len(path) == 1:
        data[path[0]] = value
        return
    current = data.get(path[0])
    if path[0] in _SHORTHAND and isinstance(current, str | list) and not (path[0] == "reward" and path[1].isdigit()):
        current = {_SHORTHAND[path[0]]: current}
    data[path[0]] = _merged(current, path[1:], value, override)


def _nested(path: Sequence[str], value: Any) -> Any:
    return {path[0]: _nested(path[1:], value)} if path else value


def _merged(current: Any, path: Sequence[str], nested: Any, override: str) -> Any:
    """Return ``current`` with the value at ``path`` of ``nested`` in place."""
    if not path:
        return nested
    if isinstance(current, list):
        if not path[0].isdigit() or int(path[0]) >= len(current):
            raise UserError(f"override {override!r}: {path[0]!r} is no item of a list of {len(current)} (from 0)")
        index = int(path[0])
        item = {"name": current[index]} if isinstance(current[index], str) and len(path) > 1 else current[index]
        return [*current[:index], _merged(item, path[1:], nested[path[0]], override), *current[index + 1 :]]
    if current is not None and not isinstance(current, Mapping):
        raise UserError(f"override {override!r}: {shown(current)} is there, which has no key {path[0]!r}")
    inner = (current or {}).get(path[0])
    return {**(current or {}), path[0]: _merged(inner, path[1:], nested[path[0]], override)}


def with_absolute_paths(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return the data with its paths made absolute: they are relative to the file that names them."""
    data = dict(data)
    if isinstance(data.get("plugins"), list):
        data["plugins"] = [_anchored(item, base) if isinstance(item, str) else item for item in data["plugins"]]
    paths = (
        ("prompts", "source", _is_prompt_file),
        ("model", "id", _is_model_folder),
        ("algorithm", "data", _is_preference_file),
    )
    for section, key, is_path in paths:
        value = data.get(section)
        if isinstance(value, str) and is_path(value, base):
            data[section] = _anchored(value, base)
        elif isinstance(value, Mapping) and isinstance(value.get(key), str) and is_path(value[key], base):
            data[section] = {**value, key: _anchored(value[key], base)}
    return data


def _anchored(path: str, base: Path) -> str:
    return os.path.normpath(base / Path(path).expanduser())


def _is_prompt_file(value: str, base: Path) -> bool:
    return Path(value).suffix.lower() in SUFFIXES


def _is_preference_file(value: str, base: Path) -> bool:
    return Path(value).suffix.lower() in PREFERENCE_SUFFIXES


def _is_model_folder(value: str, base: Path) -> bool:
    # "owner/name" may be a folder or a hub id: it is a folder if there is a pipeline in it.
    return value.startswith((".", "~")) or (base / value / "model_index.json").is_file()
