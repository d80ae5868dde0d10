"""The recipes that ship with the package."""

from __future__ import annotations

import importlib.resources
import re

from difftune.registry import nearest
from difftune.types import UserError


def recipes() -> dict[str, str]:
    """Return the recipes that ship with the package: name to the description in their first line."""
    folder = importlib.resources.files("difftune.configs")
    found = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name: recipe_text(name).splitlines()[0].lstrip("# ").strip() for name in found}


def recipe_text(name: str) -> str:
    """Return a recipe as it was written, comments included.

    Raises:
        UserError: there is none of that name; the message has the nearest one.
    """
    folder = importlib.resources.files("difftune.configs")
    file = folder / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not file.is_file():
        known = list(recipes())
        raise UserError(f"unknown recipe {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return file.read_text(encoding="utf-8")
