"""Pictures of any latents, through the pipeline's own last lines: for algorithms that score what a step predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from difftune.sampler import Sampler
from difftune.types import SampleKey


def decode(
    sampler: Sampler,
    latents: Tensor,
    prompts: Sequence[str],
    keys: Sequence[SampleKey],
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the pictures ``(B, 3, H, W)`` of ``latents`` ``(B, *latent)``: :meth:`Sampler.decode`."""
    return sampler.decode(latents, prompts, keys, conditions)
