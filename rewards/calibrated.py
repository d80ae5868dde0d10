"""Calibration: a reward standardised by the mean and deviation of all the scores that it has given so far.

Rewards come in kB, cosines and points from 1 to 10. On a common scale their weights mean what they say. The statistics
are Welford's, merged batch by batch (Chan et al. 1979), and travel with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._combine import OneTerm, Term
from difftune.types import RewardOutput, UserError


@reward("calibrated")
class Calibrated(OneTerm):
    """A reward standardised by its own running mean and standard deviation.

    A batch is counted in before it is scored, so that the first one is standardised too, and scores depend on those
    before. Until two different scores have been seen they are only centred.

    Args:
        of: the term.
        freeze_after: scores after which mean and deviation stay as they are, so that the reward no longer moves;
            ``null`` for never.
    """

    range = "about [-3, 3]"

    def __init__(self, of: Term, freeze_after: int | None = None) -> None:
        super().__init__(of)
        self.freeze_after = freeze_after
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` standardised scores; the uncertainty, if there is one, is divided alike."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        scores, sigma = self.inner(outputs), outputs[0].uncertainty
        if self.freeze_after is None or self.count < self.freeze_after:
            self._update(scores.detach().double())
        spread = self.spread
        return RewardOutput((scores - self.mean) / spread, parts, None if sigma is None else sigma / spread)

    @property
    def spread(self) -> float:
        """The standard deviation of the scores so far; 1 where they were all equal."""
        deviation = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return deviation if deviation > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def _update(self, scores: Tensor) -> None:
        count, mean = len(scores), float(scores.mean()) if len(scores) else 0.0
        if not count or not torch.isfinite(scores).all():
            return  # the check of what is returned says which sample it was
        apart, both = mean - self.mean, self.count + count
        self.squares += float((scores - mean).square().sum()) + apart**2 * self.count * count / both
        self.mean += apart * count / both
        self.count = both

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, and the states of the terms under ``of``."""
        own = {"count": self.count, "mean": self.mean, "squares": self.squares}
        return {**own, "of": super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the statistics back."""
        if not {"count", "mean", "squares"} <= set(state):
            raise UserError(f"reward {self.name!r}: the state has no count, mean and squares; is it another reward's?")
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])
        super().load_state_dict(state.get("of", {}))
