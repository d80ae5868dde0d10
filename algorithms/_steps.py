"""Random steps, for methods that differentiate one part of the sampling."""

from __future__ import annotations

import torch


def middle_step(bounds: tuple[float, float], steps: int, generator: torch.Generator) -> int:
    """Return m in 0 ... ``steps`` - 1, drawn evenly from the steps within ``bounds``, shares of all steps."""
    low = min(int(bounds[0] * steps), steps - 1)
    high = max(min(round(bounds[1] * steps), steps), low + 1)
    return int(torch.randint(low, high, (1,), generator=generator))
