"""Pictures of any latents, through the pipeline's own last lines: for algorithms that score what a step predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.denoiser import Action
from difftune.puppet import Prediction
from difftune.sampler import Sampler, to_images
from difftune.types import SampleKey


class _Decoder:
    """A driver that runs the loop without the denoiser and ends it with the given latents."""

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents

    def timesteps(self, scheduler: Any) -> None:
        pass

    def action(self, index: int) -> Action:
        return "skip"

    def step(self, prediction: Prediction) -> Tensor:
        if not prediction.last:
            return prediction.sample
        # What the pipeline does after its loop is the decoding, and it is to carry the graph.
        torch.set_grad_enabled(True)
        return self._latents.to(prediction.sample.dtype)


def decode(
    sampler: Sampler,
    latents: Tensor,
    prompts: Sequence[str],
    keys: Sequence[SampleKey],
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the pictures ``(B, 3, H, W)`` of ``latents`` ``(B, *latent)``, with the graph back to them.

    Costs no denoiser call; the sampler must have drawn something before.
    """
    driver = _Decoder(latents)
    return to_images(sampler._drive(driver, tuple(prompts), tuple(keys), conditions or {}), len(prompts))
