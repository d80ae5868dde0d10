"""Products, means and pessimistic ensembles of several rewards.

Put the terms on a common scale first (``calibrated``, ``affine``): a minimum of a CLIP cosine and a file size is the
file size. A weighted sum needs no name: it is what a list of rewards means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._combine import Combination, Term, stacked_totals
from difftune.types import RewardOutput, UserError


@reward("product")
class Product(Combination):
    """The product of rewards, each to the power of its weight: high only where all are.

    A term whose weight is not 1 must not be negative.

    Args:
        of: the terms.
    """

    def __init__(self, of: list[Term]) -> None:
        super().__init__(of)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``prod_i r_i^(w_i)``."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        total = torch.ones_like(outputs[0].total)
        for (label, weight, _), out in zip(self.terms, outputs, strict=True):
            if weight != 1:
                _refuse_negative(self.name, label, out.total, prompts)
            total = total * (out.total if weight == 1 else out.total.pow(weight))
        return RewardOutput(total, parts)


@reward("harmonic_mean")
class HarmonicMean(Combination):
    """The weighted harmonic mean of rewards that are not negative: near the smallest of them.

    ``r = 1 / sum_i (w_i / r_i)`` with the weights as shares of 1; a term of weight 0 does not count.

    Args:
        of: the terms.
    """

    def __init__(self, of: list[Term]) -> None:
        super().__init__(of)
        self.shares = self.weighted()

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` means; a term at 0 makes it 0."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        inverse = torch.zeros_like(outputs[0].total)
        for share, (label, _, _), out in zip(self.shares, self.terms, outputs, strict=True):
            if share > 0:
                _refuse_negative(self.name, label, out.total, prompts)
                inverse = inverse + share / (out.total + 1e-8)
        return RewardOutput(1 / inverse, parts)


def _refuse_negative(name: str, label: str, scores: Tensor, prompts: Sequence[str]) -> None:
    bad = (scores.detach() < 0).nonzero().flatten()
    if len(bad):
        index = int(bad[0])
        raise UserError(
            f"reward {name!r}: {label!r} gave {float(scores[index]):.4g} for sample {index} (prompt "
            f"{prompts[index]!r}), expected 0 or more; shift it with {{name: affine, offset: ...}}"
        )


def mean_min(totals: Tensor, nominal: Tensor, balance: float) -> Tensor:
    """Return ``balance * nominal + (1 - balance) * min over the K rows``, ``(B,)``."""
    return balance * nominal + (1 - balance) * totals.amin(0)


@reward("mean_min")
class MeanMin(Combination):
    """A nominal score and the worst of the ensemble: ``lambda * nominal + (1 - lambda) * min_i r_i``.

    Yan et al. 2024, "Reward-Robust RLHF" (arXiv 2409.15360). The paper's nominal head is one of its ensemble; without
    one, the weighted mean is taken.

    Args:
        of: the terms, on a common scale.
        balance: lambda, 1 for the nominal score alone, 0 for the worst case.
        nominal: ``mean``, the weighted mean of the terms, or ``first``, the first of them.
    """

    def __init__(self, of: list[Term], balance: float = 0.5, nominal: Literal["mean", "first"] = "mean") -> None:
        super().__init__(of)
        if not 0 <= balance <= 1:
            raise UserError(f"reward {self.name!r}: balance is {balance}, expected 0 to 1")
        if nominal not in ("mean", "first"):
            raise UserError(f"reward {self.name!r}: nominal is {nominal!r}, expected 'mean' or 'first'")
        self.balance, self.nominal, self.shares = balance, nominal, self.weighted()

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` scores."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        totals = stacked_totals(outputs)
        nominal = totals[0] if self.nominal == "first" else totals.new_tensor(self.shares) @ totals
        return RewardOutput(mean_min(totals, nominal, self.balance), parts)


def entropic(totals: Tensor, shares: Tensor, beta: float) -> Tensor:
    """Return ``-beta log sum_k shares_k exp(-r_k / beta)`` over the K rows, ``(B,)``."""
    return -beta * torch.logsumexp(shares.log()[:, None] - totals / beta, 0)


@reward("entropic")
class Entropic(Combination):
    """A soft minimum of rewards: ``-beta log E[exp(-r / beta)]``, the worst case within a KL ball.

    A large ``beta`` gives the mean, a small one the minimum; between them, about ``mean - var / (2 beta)``.

    Args:
        of: the terms, on a common scale; weights are their probabilities.
        beta: how far from the minimum, in units of the scores.
    """

    def __init__(self, of: list[Term], beta: float = 1.0) -> None:
        super().__init__(of)
        if beta <= 0:
            raise UserError(f"reward {self.name!r}: beta is {beta}, expected a positive number")
        self.beta, self.shares = beta, self.weighted(positive=True)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` scores."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        totals = stacked_totals(outputs)
        return RewardOutput(entropic(totals, totals.new_tensor(self.shares), self.beta), parts)


@reward("mean_variance")
class MeanVariance(Combination):
    """The mean of an ensemble minus ``penalty`` times its variance: what the scorers do not agree on counts less.

    Coste et al. 2023, "Reward model ensembles help mitigate overoptimization" (arXiv 2310.02743), UWO. The spread of
    the terms is reported as the score's uncertainty.

    Args:
        of: the terms, on a common scale.
        penalty: factor on the variance.
    """

    def __init__(self, of: list[Term], penalty: float = 0.5) -> None:
        super().__init__(of)
        self.penalty, self.shares = penalty, self.weighted()

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` scores and the terms' standard deviation as uncertainty."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        totals = stacked_totals(outputs)
        shares = totals.new_tensor(self.shares)
        mean = shares @ totals
        variance = shares @ (totals - mean).square()
        # Shifted, so that scorers that agree have a finite slope.
        return RewardOutput(mean - self.penalty * variance, parts, (variance + 1e-12).sqrt())


@reward("precision_weighted")
class PrecisionWeighted(Combination):
    """The mean of rewards that know their uncertainty, each weighted by ``w_i / sigma_i^2``.

    The uncertainty of the result is ``1 / sqrt(sum_i 1 / sigma_i^2)``.

    Args:
        of: the terms; each must report an uncertainty.
    """

    def __init__(self, of: list[Term]) -> None:
        super().__init__(of)
        self.weighted(positive=True)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` means."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        precisions = []
        for (label, weight, _), out in zip(self.terms, outputs, strict=True):
            precisions.append(weight / known_uncertainty(self.name, label, out).square().clamp_min(1e-12))
        shares = torch.stack(precisions)
        total = (shares * stacked_totals(outputs)).sum(0) / shares.sum(0)
        return RewardOutput(total, parts, shares.sum(0).rsqrt())


def known_uncertainty(name: str, label: str, out: RewardOutput) -> Tensor:
    """Return a term's uncertainty ``(B,)``; :class:`UserError` where it reports none."""
    if out.uncertainty is None:
        raise UserError(f"reward {name!r}: {label!r} reports no uncertainty; choose a term that does")
    return out.uncertainty


@reward("lower_bound")
class LowerBound(Combination):
    """A reward minus ``k`` times its own uncertainty: the benefit of the doubt is not given.

    Args:
        of: the term; it must report an uncertainty.
        k: how many standard deviations.
    """

    def __init__(self, of: Term, k: float = 1.0) -> None:
        super().__init__(of)
        self.k = k

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` bounds."""
        outputs, parts = self.score_terms(images, prompts, metadata)
        total = torch.zeros_like(outputs[0].total)
        for (label, weight, _), out in zip(self.terms, outputs, strict=True):
            total = total + weight * out.total - abs(weight) * self.k * known_uncertainty(self.name, label, out)
        return RewardOutput(total, parts)
