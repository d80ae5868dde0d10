"""Random steps, for methods that differentiate one part of the sampling."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 <= low < high <= 1:
        raise ValueError(f"got ({low:g}, {high:g}), expected 0 <= low < high <= 1")
    return bounds


Shares = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""A part of the steps, from one share of them to another: 0 is the first step, 1 past the last."""


def middle_step(bounds: tuple[float, float], steps: int, generator: torch.Generator) -> int:
    """Return m in 0 ... ``steps`` - 1, drawn evenly from the steps within ``bounds``, shares of all steps."""
    low = min(int(bounds[0] * steps), steps - 1)
    high = max(min(round(bounds[1] * steps), steps), low + 1)
    return int(torch.randint(low, high, (1,), generator=generator))
