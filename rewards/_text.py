"""Which text a picture is asked to show, and how two texts are compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from difftune.types import UserError

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def wanted_text(name: str, prompt: str, metadata: Mapping[str, Any]) -> str:
    """Return the text that a sample's picture must show.

    It is the metadata's ``text``, else what stands between the prompt's first pair of double quotes, else the prompt.

    Raises:
        UserError: the metadata's ``text`` is no string.
    """
    given = metadata.get("text")
    if given is None:
        quoted = _QUOTED.search(prompt)
        return prompt if quoted is None else quoted[1] or quoted[2]
    if not isinstance(given, str):
        raise UserError(f"reward {name!r}: text of prompt {prompt!r} is {given!r}, expected a string")
    return given


def edit_distance(first: str, second: str) -> int:
    """Return Levenshtein's distance: the fewest insertions, deletions and substitutions between two texts."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, 1):
        last, row[0] = row[0], number
        for column, other in enumerate(second, 1):
            last, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, last + (letter != other))
    return row[-1]
