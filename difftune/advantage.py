"""From rewards to advantages: per prompt, per group, per batch. Fp32 in, fp32 out, ``(B,)``; no gradients.

A *group* is the samples of one prompt in one epoch. Standardisation divides by ``std + 1e-4``, so that equal rewards
that differ by rounding only do not become advantages of size 1; equal rewards give exactly 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Added to every standard deviation (see reliability: jitter of 1e-7 must not become an advantage of 1).
EPSILON = 1e-4


def groups_of(prompts: Sequence[str]) -> list[list[int]]:
    """Return the indices of each prompt's samples, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return list(groups.values())


def _standardised(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (rewards - mean) / (std + EPSILON)


def _spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population std; equal values have exactly that mean and std 0, at any scale."""
    if bool((values == values[0]).all()):
        return values[0], torch.zeros_like(values[0])
    return values.mean(), values.std(correction=0)


def normalize_batch(rewards: Tensor) -> Tensor:
    """Return (r - mean) / (std + 1e-4) over the whole batch ``(B,)``; std is the population's (ddof 0)."""
    rewards = rewards.detach().float()
    return _standardised(rewards, *_spread(rewards))


def normalize_groups(rewards: Tensor, prompts: Sequence[str], global_std: bool = False) -> Tensor:
    """Return rewards standardised within each prompt's group (GRPO).

    Args:
        rewards: ``(B,)``.
        prompts: ``B`` prompts.
        global_std: divide by the std of the whole batch in place of the group's (Flow-GRPO).

    Groups of one sample, and groups of equal rewards, get exactly 0.
    """
    rewards = rewards.detach().float()
    out = torch.zeros_like(rewards)
    _, everywhere = _spread(rewards)
    for group in groups_of(prompts):
        mean, std = _spread(rewards[group])
        out[group] = _standardised(rewards[group], mean, everywhere if global_std else std)
    return out


class PromptStatistics:
    """DDPO's running statistics: a buffer of the latest rewards of each prompt, over epochs.

    Args:
        buffer_size: rewards kept per prompt; the oldest are dropped first.
        min_count: a prompt with fewer rewards uses the batch's mean and std.

    Source: Black et al. 2023, section 5.1 (per-prompt normalisation), with the defaults of the authors' code (32, 16).
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._buffers: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Add the batch's rewards ``(B,)`` and return its advantages ``(B,)``."""
        rewards = rewards.detach().float()
        out = torch.zeros_like(rewards)
        batch_mean, batch_std = _spread(rewards)
        groups = {prompts[group[0]]: group for group in groups_of(prompts)}
        for prompt, group in groups.items():
            buffer = self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size))
            buffer.extend(rewards[group].tolist())
            if len(buffer) < self.min_count:
                mean, std = batch_mean, batch_std
            else:
                mean, std = _spread(torch.tensor(list(buffer)).to(rewards))
            out[group] = _standardised(rewards[group], mean, std)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the buffers as lists."""
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the buffers."""
        self._buffers = {p: deque(values, maxlen=self.buffer_size) for p, values in state.items()}
