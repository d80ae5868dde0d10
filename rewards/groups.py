"""Rewards that compare the samples of one prompt: rank, pairwise win rate, per-reward standardisation.

A small difference between two good samples can be noise of the scorer, which standardisation blows up to an advantage
of 1. Ranks and win rates have a fixed scale in every group. Two prompts of one text over two pictures are two groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.advantage import groups_of, normalize_batch, normalize_groups
from difftune.prompts import told_apart
from difftune.reward import reward
from difftune.rewards._combine import Combination, OneTerm, Term
from difftune.types import RewardOutput, UserError


class _Grouped(OneTerm):
    differentiable = False
    groupwise = True

    def __init__(self, of: Any) -> None:
        super().__init__(of)
        self.groupwise, self.differentiable = True, False  # type: ignore[misc]


@reward("group_rank")
class GroupRank(_Grouped):
    """The rank of the sample among those of its prompt, from 1/n (worst) to 1 (best); ties share the mean rank.

    Args:
        of: the term.
    """

    range = "(0, 1]"

    def __init__(self, of: Term) -> None:
        super().__init__(of)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` ranks divided by the group's size."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        scores = self.inner(outputs)
        total = torch.zeros_like(scores)
        for group in groups_of(told_apart(prompts, metadata)):
            rows = scores[group]
            below = (rows[:, None] > rows[None]).float().sum(1)
            same = (rows[:, None] == rows[None]).float().sum(1)
            total[group] = (below + (same + 1) / 2) / len(group)
        return RewardOutput(total, parts)


@reward("win_rate")
class WinRate(_Grouped):
    """How often the sample beats another of its prompt, over all pairs.

    Wang et al. 2025, "Pref-GRPO" (arXiv 2508.20751). One sample beats another with probability 1 if its score is
    higher (1/2 if equal); with a ``temperature`` T, ``sigmoid((r_i - r_j) / T)``; and where the term reports an
    uncertainty and no temperature is given, ``Phi((r_i - r_j) / sqrt(sigma_i^2 + sigma_j^2))``. A single sample has
    1/2.

    Args:
        of: the term.
        temperature: of the comparison, in units of the scores; 0 for a hard one.
    """

    range = "[0, 1]"

    def __init__(self, of: Term, temperature: float = 0.0) -> None:
        super().__init__(of)
        if temperature < 0:
            raise UserError(f"reward {self.name!r}: temperature is {temperature}, expected at least 0")
        self.temperature = temperature

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` win rates."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        scores, sigma = self.inner(outputs), outputs[0].uncertainty
        total = torch.full_like(scores, 0.5)
        for group in groups_of(told_apart(prompts, metadata)):
            if len(group) == 1:
                continue
            difference = scores[group][:, None] - scores[group][None]
            if self.temperature > 0:
                wins = torch.sigmoid(difference / self.temperature)
            elif sigma is not None:
                spread = (sigma[group][:, None].square() + sigma[group][None].square()).sqrt()
                wins = torch.special.ndtr(difference / spread.clamp_min(1e-12))
            else:
                wins = (difference > 0).float() + 0.5 * (difference == 0).float()
            # Every sample ties with itself.
            total[group] = (wins.sum(1) - 0.5) / (len(group) - 1)
        return RewardOutput(total, parts)


@reward("gdpo")
class Gdpo(Combination):
    """Each reward standardised within its prompt, then the weighted sum, then standardised over the batch.

    Liu et al. 2026, "GDPO" (arXiv 2601.05242): unlike standardising the sum, it does not let the reward with the
    largest variance decide, and multiplying one reward by a number changes nothing. Train with an algorithm that does
    not standardise within the prompt again, or knows that it does.

    Args:
        of: the terms with their weights.
    """

    differentiable = False
    groupwise = True
    range = "about [-3, 3]"

    def __init__(self, of: list[Term]) -> None:
        super().__init__(of)
        self.groupwise, self.differentiable = True, False  # type: ignore[misc]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` standardised sums."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        total = torch.zeros_like(outputs[0].total)
        samples = told_apart(prompts, metadata)
        for (_, weight, _), out in zip(self.terms, outputs, strict=True):
            total = total + weight * normalize_groups(out.total, samples)
        return RewardOutput(normalize_batch(total), parts)
