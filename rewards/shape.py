"""Shapes: one reward, changed sample by sample. Scaled, aimed at a target, cut off.

The hinge and target forms are those of ReFL (``relu(2 - r)``) and of AlignProp (``|target - r|``), as rewards: a sample
that is good enough is not made better at the cost of the others. ``clip`` is one half of Gao et al. 2024, "On designing
effective RL reward at training time" (arXiv 2410.15115): scores are never positive, so that collecting more of them
never pays.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._combine import OneTerm, Term
from difftune.types import RewardOutput, UserError


class _Shape(OneTerm):
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return the changed scores ``(B,)``; the parts have them as they were."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        sigma = outputs[0].uncertainty
        unsure = None if sigma is None else self._changed_uncertainty(sigma)
        return RewardOutput(self._changed(self.inner(outputs)), parts, unsure)

    def _changed_uncertainty(self, sigma: Tensor) -> Tensor | None:
        # Where a shape bends, the score's distribution is no longer told by one deviation.
        return None

    def _changed(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


@reward("affine")
class Affine(_Shape):
    """``scale * r + offset``, e.g. to put rewards on a common scale.

    The uncertainty, where the term reports one, is multiplied by ``|scale|``; the shapes that bend report none.

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

    def _changed_uncertainty(self, sigma: Tensor) -> Tensor:
        return abs(self.scale) * sigma


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
    attenuated with the distance from the middle, so that the reward does not freeze the picture. The paper draws one
    frame g(i) at random from each of S segments of F frames (``random: true``)::

        r = (1 / S) sum_i f_i r(frame g(i)),        f_i = exp(-rate |g(i) - F / 2|), frames from 0, rate 1

    That is nearly nothing for a long film. By default the middle frame of each segment is scored, distances count
    segments, and the weights sum to 1. Stills are scored as they are. Errors of a film's frames are not independent, so
    the same sum of their uncertainties, which is an upper bound, is the film's.

    Args:
        of: the term, any scorer of pictures.
        segments: of how many equal pieces one frame each is scored.
        rate: how fast the weight falls with the distance from the middle; 0 for equal weights.
        random: the paper's form; a film's own pixels are the seed, so that a film has one score.
    """

    def __init__(self, of: Term, segments: int = 4, rate: float = 0.5, random: bool = False) -> None:
        super().__init__(of)
        if segments < 1 or rate < 0:
            raise UserError(
                f"reward {self.name!r}: segments is {segments} and rate {rate}, expected at least 1 and at least 0"
            )
        self.segments, self.rate, self.random = segments, rate, random

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Let the term begin on the chosen frames, which it scores one by one."""
        for frame in self._chosen(images)[0].unbind(1) if images.ndim == 5 else (images,):
            super().begin(frame, prompts, metadata)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` weighted means over the chosen frames."""
        if images.ndim == 4:
            outputs, parts = self.score_terms(images, prompts, metadata)
            return RewardOutput(self.inner(outputs), parts, outputs[0].uncertainty)
        frames, weights = self._chosen(images)
        sums: dict[str, Tensor] = {}
        unsure: list[Tensor] = []
        for frame, weight in zip(frames.unbind(1), weights.unbind(1), strict=True):
            outputs, parts = self.score_terms(frame, prompts, metadata)
            for key, value in {"": self.inner(outputs), **parts}.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + weight.to(value) * value
            sigma = outputs[0].uncertainty
            if sigma is not None:
                unsure.append(weight.to(sigma) * sigma)
        uncertainty = torch.stack(unsure).sum(0) if len(unsure) == frames.shape[1] else None
        return RewardOutput(sums.pop(""), sums, uncertainty)

    def _chosen(self, films: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames ``(B, S, 3, H, W)`` that stand for the segments, and their weights ``(B, S)``."""
        count = films.shape[1]
        if self.random:
            chosen = torch.tensor([drawn_frames(film, self.segments) for film in films])
            weights = torch.exp(-self.rate * (chosen - count / 2).abs()) / chosen.shape[1]
        else:
            places, shares = segment_weights(count, self.segments, self.rate)
            chosen, weights = torch.tensor([places] * len(films)), torch.tensor([shares] * len(films))
        return films[torch.arange(len(films))[:, None], chosen], weights


def drawn_frames(film: Tensor, segments: int) -> list[int]:
    """Return one frame of each segment of a film ``(F, 3, H, W)``, drawn by what is seen in the film."""
    seen = (film.detach()[..., ::8, ::8] * 255).round().to("cpu", torch.uint8)
    source = random.Random(hashlib.blake2b(seen.numpy().tobytes()).digest())
    count = min(len(film), segments)
    edges = [index * len(film) // count for index in range(count + 1)]
    return [source.randrange(start, end) for start, end in zip(edges, edges[1:], strict=False)]


def segment_weights(frames: int, segments: int, rate: float) -> tuple[list[int], list[float]]:
    """Return the frames that stand for the segments, and their weights (which sum to 1)."""
    count = min(frames, segments)
    chosen = [(2 * index + 1) * frames // (2 * count) for index in range(count)]
    weights = [math.exp(-rate * abs(index - (count - 1) / 2)) for index in range(count)]
    return chosen, [weight / sum(weights) for weight in weights]
