"""Calibration: a reward standardised by the mean and deviation of all the scores that it has given so far.

Rewards come in kB, cosines and points from 1 to 10. On a common scale their weights mean what they say. The statistics
are Welford's, merged batch by batch (Chan et al. 1979), and travel with the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._combine import OneTerm, Term
from difftune.types import RewardOutput, UserError


@dataclass(frozen=True)
class Moments:
    """How many scores there were, their mean, and the sum of their squared differences to it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, other: Moments) -> Moments:
        """Return those of both."""
        both = self.count + other.count
        if not both:
            return self
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.count * other.count / both
        return Moments(both, self.mean + apart * other.count / both, squares)


def moments(scores: Tensor) -> Moments:
    """Return the moments of ``(B,)`` scores; none where one of them is not finite."""
    # The check of what is returned says which sample it was.
    if not len(scores) or not torch.isfinite(scores).all():
        return Moments()
    mean = float(scores.mean())
    return Moments(len(scores), mean, float((scores - mean).square().sum()))


@reward("calibrated")
class Calibrated(OneTerm):
    """A reward standardised by its own running mean and standard deviation.

    A batch is counted in before it is scored, so that the first one is standardised too, and scores depend on those
    before. Until two different scores have been seen they are only centred.

    Where gradients are asked for, the batch is a part of an optimizer step. Its scores are standardised as of the
    step's beginning (before there is any, left as they are) and count once the step is over (:meth:`settle`), so that
    it does not matter how the step is cut into micro-batches.

    Args:
        of: the term.
        freeze_after: scores after which mean and deviation stay as they are, so that the reward no longer moves;
            ``null`` for never.
    """

    range = "about [-3, 3]"

    def __init__(self, of: Term, freeze_after: int | None = None) -> None:
        super().__init__(of)
        self.freeze_after = freeze_after
        self.seen, self._kept_back = Moments(), Moments()

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` standardised scores; the uncertainty, if there is one, is divided alike."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        scores, sigma = self.inner(outputs), outputs[0].uncertainty
        found = moments(scores.detach().double())
        if images.requires_grad and torch.is_grad_enabled():
            self._kept_back = self._kept_back.merged(found)
        else:
            self._count_in(found)
        spread = self.spread
        return RewardOutput((scores - self.seen.mean) / spread, parts, None if sigma is None else sigma / spread)

    @property
    def spread(self) -> float:
        """The standard deviation of the scores so far; 1 where they were all equal."""
        seen = self.seen
        deviation = (seen.squares / seen.count) ** 0.5 if seen.count else 0.0
        return deviation if deviation > 1e-6 * max(1.0, abs(seen.mean)) else 1.0

    def _count_in(self, found: Moments) -> None:
        if self.freeze_after is None or self.seen.count < self.freeze_after:
            self.seen = self.seen.merged(found)

    def collect(self) -> Any:
        """Hand over the moments of the scores that were asked for with gradients, and what the term kept back."""
        kept, self._kept_back = self._kept_back, Moments()
        term = super().collect()
        return None if not kept.count and term is None else {"own": dataclasses.asdict(kept), "of": term}

    def settle(self, found: Sequence[Any]) -> None:
        """Count those scores in."""
        step = Moments()
        for one in found:
            step = step.merged(Moments(**one["own"]))
        self._count_in(step)
        super().settle([one["of"] for one in found if one["of"] is not None])

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, and the states of the terms under ``of``."""
        return {**dataclasses.asdict(self.seen), "of": super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the statistics back; what was kept back is given up."""
        if not {"count", "mean", "squares"} <= set(state):
            raise UserError(f"reward {self.name!r}: the state has no count, mean and squares; is it another reward's?")
        self.seen = Moments(int(state["count"]), float(state["mean"]), float(state["squares"]))
        self._kept_back = Moments()
        super().load_state_dict(state.get("of", {}))
