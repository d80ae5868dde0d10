"""From rewards to advantages, weights and pairs: per prompt, per group, per batch. Fp32, ``(B,)``; no gradients.

A *group* is the samples of one prompt in one epoch. Standardisation divides by ``std + 1e-4``, so that equal rewards
that differ by rounding only do not become advantages of size 1; equal rewards give exactly 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: Added to every standard deviation (see reliability: jitter of 1e-7 must not become an advantage of 1).
EPSILON = 1e-4

#: Rewards that differ by less than this share of their size are equal but for rounding: they make no pair.
ROUNDING = 1e-6


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


def exponential_weights(rewards: Tensor, scale: float, prompts: Sequence[str] | None = None) -> Tensor:
    """Return weights ``(B,)`` proportional to exp(scale * r) with mean 1, over the batch or within each prompt.

    ``scale`` multiplies: a temperature T, as in exp(r / T), is scale = 1 / T. A constant added to the rewards changes
    nothing.
    """
    rewards = rewards.detach().float()
    out = torch.ones_like(rewards)
    for group in [list(range(len(rewards)))] if prompts is None else groups_of(prompts):
        out[group] = torch.softmax(scale * rewards[group], 0) * len(group)
    return out


def above_quantile(rewards: Tensor, quantile: float) -> Tensor:
    """Return ``(B,)`` 1 for the rewards above the batch's quantile, 0 for the others.

    Where more samples than that share the best reward (a reward that is 0 or 1), these are the ones that get 1.
    """
    rewards = rewards.detach().float()
    kept = rewards > torch.quantile(rewards, quantile)
    return kept.float() if bool(kept.any()) else (rewards == rewards.max()).float()


def signs_in_groups(rewards: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return ``(B,)`` +1 for rewards above the mean of their prompt's, -1 below, 0 at it (but for rounding)."""
    advantage = normalize_groups(rewards, prompts)
    return torch.where(advantage.abs() < 1e-2, torch.zeros_like(advantage), advantage.sign())


def best_of_groups(rewards: Tensor, prompts: Sequence[str], keep: int = 1) -> list[int]:
    """Return the indices of the ``keep`` best samples of each prompt; of equal ones the first."""
    chosen: list[int] = []
    for group in groups_of(prompts):
        order = torch.argsort(rewards[group].detach().float(), descending=True, stable=True)
        chosen.extend(group[i] for i in order[:keep].tolist())
    return chosen


# -- pairs -------------------------------------------------------------------------------------------------------


def exceeds(high: Tensor, low: Tensor, margin: float = 0.0) -> bool:
    """Return whether a reward is above another by more than ``margin``, and by more than rounding."""
    least = ROUNDING * float(torch.maximum(high.abs(), low.abs()))
    return float(high - low) > max(margin, least)


@dataclass(frozen=True)
class Pairs:
    """Comparisons within a micro-batch.

    Attributes:
        winners, losers: ``(P,)`` indices into the micro-batch.
        weights: ``(P,)`` with mean 1: every sample of a unit counts the same, however many pairs the unit has.
    """

    winners: Tensor
    losers: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.winners)


def preference_units(
    rewards: Tensor, prompts: Sequence[str], mode: Literal["best_worst", "all"] = "best_worst", margin: float = 0.0
) -> list[list[int]]:
    """Return the samples that are compared, one list per prompt: its best and worst, or all of its samples.

    Prompts whose rewards differ by no more than ``margin``, or by rounding only, make no pair and are left out.
    """
    rewards = rewards.detach().float()
    units = []
    for group in groups_of(prompts):
        best, worst = int(rewards[group].argmax()), int(rewards[group].argmin())
        if exceeds(rewards[group[best]], rewards[group[worst]], margin):
            units.append([group[best], group[worst]] if mode == "best_worst" else group)
    return units


def pairs_of(
    rewards: Tensor, units: Sequence[Sequence[int]], margin: float = 0.0, ties: bool = False
) -> Pairs:
    """Return all pairs (winner, loser) within each unit whose rewards differ by more than ``margin``.

    Args:
        rewards: ``(B,)``.
        units: indices that are compared with one another.
        margin: smallest difference (exclusive) that makes a pair; one of rounding never does.
        ties: keep the pairs within the margin too, in the order of their rewards.
    """
    winners: list[int] = []
    losers: list[int] = []
    weights: list[float] = []
    for unit in units:
        found = []
        for place, i in enumerate(unit):
            for j in unit[place + 1 :]:
                high, low = (i, j) if float(rewards[i]) >= float(rewards[j]) else (j, i)
                if ties or exceeds(rewards[high], rewards[low], margin):
                    found.append((high, low))
        winners.extend(high for high, _ in found)
        losers.extend(low for _, low in found)
        weights.extend([len(unit) / len(found)] * len(found) if found else [])
    device = rewards.device
    weight = torch.tensor(weights, device=device)
    samples = max(sum(len(unit) for unit in units), 1)
    return Pairs(
        torch.tensor(winners, dtype=torch.long, device=device),
        torch.tensor(losers, dtype=torch.long, device=device),
        weight * (len(weights) / samples),
    )


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
