"""Shapes: one reward, changed sample by sample. Scaled, aimed at a target, cut off.

The hinge and target forms are those of ReFL (``relu(2 - r)``) and of AlignProp (``|target - r|``), as rewards: a sample
that is good enough is not made better at the cost of the others. ``clip`` is one half of Gao et al. 2024, "On designing
effective RL reward at training time" (arXiv 2410.15115): scores are never positive, so that collecting more of them
never pays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.reward import mean_output, reward
from difftune.rewards._combine import OneTerm, Term
from difftune.types import RewardOutput, UserError


class _Shape(OneTerm):
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return the changed scores ``(B,)``; the parts have them as they were."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        return RewardOutput(self._changed(self.inner(outputs)), parts)

    def _changed(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


@reward("affine")
class Affine(_Shape):
    """``scale * r + offset``, e.g. to put rewards on a common scale.

    Args:
        of: the term.
        scale: factor.
        offset: added after scaling.
    """

    def __init__(self, of: Term, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__(of)
        self.scale, self.offset = scale, offset

    def _changed(self, scores: Tensor) -> Tensor:
        return self.scale * scores + self.offset


@reward("sigmoid")
class Sigmoid(_Shape):
    """``1 / (1 + exp(-(r - centre) / width))``: any reward in [0, 1], flat where it is very good or very bad.

    Args:
        of: the term.
        centre: the score that becomes 1/2.
        width: how far from the centre it bends.
    """

    range = "[0, 1]"

    def __init__(self, of: Term, centre: float = 0.0, width: float = 1.0) -> None:
        super().__init__(of)
        if width <= 0:
            raise UserError(f"reward {self.name!r}: width is {width}, expected a positive number")
        self.centre, self.width = centre, width

    def _changed(self, scores: Tensor) -> Tensor:
        return torch.sigmoid((scores - self.centre) / self.width)


@reward("hinge")
class Hinge(_Shape):
    """``-relu(target - r)``: pays up to a target and no further.

    Args:
        of: the term.
        target: the score that is good enough.
    """

    range = "at most 0"

    def __init__(self, of: Term, target: float) -> None:
        super().__init__(of)
        self.target = target

    def _changed(self, scores: Tensor) -> Tensor:
        return -torch.relu(self.target - scores)


@reward("target")
class Target(_Shape):
    """``-|r - target|``: best at the target, worse on both sides.

    Args:
        of: the term.
        target: the wanted score.
    """

    range = "at most 0"

    def __init__(self, of: Term, target: float) -> None:
        super().__init__(of)
        self.target = target

    def _changed(self, scores: Tensor) -> Tensor:
        return -(scores - self.target).abs()


@reward("penalty")
class Penalty(_Shape):
    """``-relu(r - above)``: nothing below a threshold, and what is above it off.

    Args:
        of: the term that is to be avoided, e.g. ``sharpness``.
        above: the score that is still allowed.
    """

    range = "at most 0"

    def __init__(self, of: Term, above: float = 0.0) -> None:
        super().__init__(of)
        self.above = above

    def _changed(self, scores: Tensor) -> Tensor:
        return -torch.relu(scores - self.above)


def clip_rewards(scores: Tensor, eta: float) -> Tensor:
    """Return ``min(r - eta, 0)``: what lies above ``eta`` is worth no more than ``eta``."""
    return (scores - eta).clamp(max=0)


def delta_rewards(scores: Tensor) -> Tensor:
    """Return the differences of scores of successive steps ``(B, K)``; the sum over steps is the first score.

    ``r_k - r_{k+1}`` for the steps before the last but one, ``r_{K-1}`` there and 0 at the last: the second half of
    Gao et al. 2024. However many steps there are, their sum is bounded.
    """
    steps = scores.shape[1]
    out = torch.zeros_like(scores)
    out[:, : steps - 2] = scores[:, : steps - 2] - scores[:, 1 : steps - 1]
    if steps > 1:
        out[:, steps - 2] = scores[:, steps - 2]
    return out


@reward("clip")
class Clip(_Shape):
    """``min(r - eta, 0)``, or a range that scores are cut to.

    Args:
        of: the term.
        eta: the score above which nothing more is paid; scores are measured from it.
        low: if given, lowest score, before eta is taken off.
    """

    def __init__(self, of: Term, eta: float = 0.0, low: float | None = None) -> None:
        super().__init__(of)
        if low is not None and low >= eta:
            raise UserError(f"reward {self.name!r}: low is {low}, expected less than eta ({eta})")
        self.eta, self.low = eta, low

    def _changed(self, scores: Tensor) -> Tensor:
        return clip_rewards(scores if self.low is None else scores.clamp(min=self.low), self.eta)


@reward("segmental")
class Segmental(OneTerm):
    """A video's score from one frame per segment, frames far from the middle counting less.

    After Yuan et al. 2023, "InstructVideo" (arXiv 2312.12490): a few frames stand for the video, and their scores are
    weighted by ``exp(-rate * |i - middle|)`` over the segments i, so that the reward does not freeze the picture.
    Stills are scored as they are.

    Args:
        of: the term, any scorer of pictures.
        segments: how many frames are scored: the middle one of each of so many equal pieces.
        rate: how fast the weight falls with the distance from the middle, per segment; 0 for equal weights.
    """

    def __init__(self, of: Term, segments: int = 4, rate: float = 0.5) -> None:
        super().__init__(of)
        if segments < 1 or rate < 0:
            raise UserError(
                f"reward {self.name!r}: segments is {segments} and rate {rate}, expected at least 1 and at least 0"
            )
        self.segments, self.rate = segments, rate

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Let the term begin on the chosen frames."""
        if images.ndim == 5:
            images = images[:, segment_weights(images.shape[1], self.segments, self.rate)[0]]
        super().begin(images, prompts, metadata)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` weighted means over the chosen frames."""
        frames = images.unbind(1) if images.ndim == 5 else (images,)
        chosen, weights = segment_weights(len(frames), self.segments, self.rate)
        scored = []
        for index in chosen:
            outputs, parts = self.score_terms(frames[index], prompts, metadata)
            scored.append(RewardOutput(self.inner(outputs), parts))
        return mean_output(scored, weights)


def segment_weights(frames: int, segments: int, rate: float) -> tuple[list[int], list[float]]:
    """Return the frames that stand for the segments, and their weights (which sum to 1)."""
    count = min(frames, segments)
    chosen = [(2 * index + 1) * frames // (2 * count) for index in range(count)]
    weights = [math.exp(-rate * abs(index - (count - 1) / 2)) for index in range(count)]
    return chosen, [weight / sum(weights) for weight in weights]
