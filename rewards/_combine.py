"""What the combinations share: rewards made of the rewards listed under ``of``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.reward import ComposedReward, build_reward, build_terms
from difftune.types import RewardOutput, UserError

#: A term: a name, a mapping with ``name``, ``weight`` and settings, or a list of them (their weighted sum).
Term = str | dict[str, Any] | list[Any]


class Combination(ComposedReward):
    """A reward of the registry that is made of others.

    Args:
        of: the terms.
    """

    differentiable = True
    video = True
    range = "depends on its terms"

    def __init__(self, of: Any) -> None:
        super().__init__(build_terms(of))

    def weighted(self, positive: bool = False) -> list[float]:
        """Return the terms' weights as shares of 1.

        Raises:
            UserError: a weight is negative (or, where that is needed, 0), or all are 0.
        """
        values = [weight for _, weight, _ in self.terms]
        if min(values) < 0 or sum(values) <= 0 or (positive and min(values) <= 0):
            wanted = "positive ones" if positive else "none below 0"
            raise UserError(f"reward {self.name!r}: weights are {values}, expected {wanted}")
        return [value / sum(values) for value in values]


class OneTerm(Combination):
    """A combination that changes the scores of one reward (or of one weighted sum)."""

    def __init__(self, of: Any) -> None:
        # A list is a weighted sum; a weight on a single term scales it before it is changed.
        super().__init__([build_reward(of)])

    def inner(self, outputs: Sequence[RewardOutput]) -> Tensor:
        """Return the term's scores ``(B,)``."""
        (out,) = outputs
        return out.total


def stacked_totals(outputs: Sequence[RewardOutput]) -> Tensor:
    """Return the totals of K terms as ``(K, B)``."""
    return torch.stack([out.total for out in outputs])
