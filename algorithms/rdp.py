r"""RDP and PRDP: (proximal) reward difference prediction (Deng et al. 2024, arXiv 2402.08714).

The log-ratio of whole trajectories to the base model is made to predict differences of rewards. With r-hat the sum over
steps of log p_theta - log p_ref, for every two samples i, j of a prompt

.. math::  \ell_{ij} = \Big(\big[\hat r_\theta(\bar x_i) - \hat r_\theta(\bar x_j)\big]
                            - \tfrac{1}{\beta}\big[r(x_0^i) - r(x_0^j)\big]\Big)^2,

which is 0 for all pairs exactly when p_theta is p_ref e^{r / beta}, normalised. PRDP clips r-hat at every step around
that of the policy that sampled, and takes the larger of both losses,

.. math::  \hat r_{\theta,t} \to \mathrm{clip}\big(\hat r_{\theta,t},\, \hat r_{\mathrm{old},t} \pm \epsilon\big),
           \quad
           L_{ij} = \max(\ell_{ij}, \ell^{\mathrm{clip}}_{ij}).

Two passes give the exact gradient with the memory of one step: the first, without gradients, finds every step's r-hat
and from them the derivative of the loss by each; the second replays the steps and runs backward at each, weighted.

Which unit and which variant. ``reduce: mean`` averages log-ratios over dimensions and steps, as the paper's listing
does over steps; beta and epsilon are the paper's and belong to it. ``reduce: sum`` is the formula itself; the same loss
has beta / (T d) there. Ties are dropped, as in the listing; here a prompt whose rewards are all equal is left out,
where the listing's mean of nothing is NaN. The initial noise is part of a trajectory that no policy controls: unless
the samples of a prompt share it (``sampler.initial_noise: prompt``) it leaves the loss a floor, but its optimum in
place. No code of the authors is public. ``reference: rollout`` with ``clip_range: null`` measures r-hat from the policy
that sampled: that is REBEL, an option of RLCM's code, with beta its eta. On flow models the same loss runs on the SDE's
Gaussians.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from difftune.advantage import Pairs, groups_of, pairs_of, preference_units
from difftune.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Context,
    Prepared,
    algorithm,
    require_finite_loss,
)
from difftune.sampler import StepView
from difftune.types import RewardOutput, Trajectory


class RDPConfig(AlgorithmConfig):
    """RDP's settings; defaults are the paper's Table 4, large scale with several rewards."""

    lr: float = Field(1e-5, gt=0, description="Learning rate of AdamW (the paper's, for the full UNet).")
    beta: float = Field(3e-5, gt=0, description="Strength of the KL, in the unit of ``reduce`` (paper: 3e-6 to 3e-5).")
    clip_range: float | None = Field(
        1e-4, gt=0, description="Proximal clip of each step's log-ratio, in the unit of ``reduce``; null: RDP, no clip."
    )
    reduce: Literal["mean", "sum"] = Field(
        "mean", description="Log-ratios averaged over dimensions and steps, or summed over both (the density)."
    )
    reference: Literal["base", "rollout"] = Field(
        "base", description="What log-ratios are to: the base model (PRDP), or the policy that sampled (REBEL)."
    )
    ties: Literal["drop", "keep"] = Field(
        "drop", description="Pairs of equal rewards: left out (the paper's listing) or regressed to 0 (its formula)."
    )


def difference_loss(log_ratio: Tensor, rewards: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """Return ``(P,)`` ((r-hat_i - r-hat_j) - (r_i - r_j) / beta)^2 of trajectories' log-ratios ``(B,)``."""
    predicted = log_ratio[pairs.winners] - log_ratio[pairs.losers]
    target = (rewards[pairs.winners] - rewards[pairs.losers]) / beta
    return (predicted - target) ** 2


def proximal_loss(
    log_ratio: Tensor, old_log_ratio: Tensor, rewards: Tensor, pairs: Pairs, beta: float, clip_range: float | None
) -> Tensor:
    """Return PRDP's losses ``(P,)`` of log-ratios ``(B, T)`` per step, to be summed over steps."""
    loss = difference_loss(log_ratio.sum(1), rewards, pairs, beta)
    if clip_range is None:
        return loss
    near = torch.minimum(torch.maximum(log_ratio, old_log_ratio - clip_range), old_log_ratio + clip_range)
    return torch.maximum(loss, difference_loss(near.sum(1), rewards, pairs, beta))


@algorithm("rdp")
class RDP(Algorithm):
    """RDP and PRDP; see the module's docstring."""

    evidence = "transitions"
    paper = "PRDP: Proximal Reward Difference Prediction for Reward Finetuning, Deng et al. 2024, arXiv 2402.08714"
    Config = RDPConfig
    compares = "compares"
    metrics = {
        "loss": "Squared error of the predicted reward differences, in the unit of (r / beta)^2, mean over pairs.",
        "explained": "Median over pairs of predicted by actual reward difference: 0 at the base model, at best 1.",
        "log_ratio_old": "Mean absolute log-ratio of a step to the policy that sampled, in the unit of `reduce`.",
    }

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return the groups of the prompts; those of equal rewards are left out unless ties are kept."""
        if self.config.ties == "keep":
            return Prepared({"reward": rewards.total}, [g for g in groups_of(prompts) if len(g) > 1])
        return Prepared({"reward": rewards.total}, preference_units(rewards.total, prompts, "all"))

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Find the loss's derivative by every step's log-prob, then replay and weight each step's gradient by it."""
        trajectory = batch.trajectory
        assert trajectory is not None
        config = self.config
        current = self._log_probs(trajectory, context)
        steps = trajectory.stochastic_steps
        scale = trajectory.dims if config.reduce == "sum" else 1.0 / len(steps)
        base = old = trajectory.log_probs[:, steps].double().cpu()
        if config.reference == "base":
            with context.policy.reference():
                base = self._log_probs(trajectory, context)
        # Sums of thousands of differences: in double precision, where theta = old is exactly that.
        log_probs = current.requires_grad_()
        rewards = batch.values["reward"].double().cpu()
        pairs = pairs_of(rewards, batch.units, ties=config.ties == "keep")
        clip = None if config.clip_range is None else config.clip_range / (1 if config.reduce == "sum" else len(steps))
        loss = proximal_loss((log_probs - base) * scale, (old - base) * scale, rewards, pairs, config.beta, clip)
        require_finite_loss(self.name, loss, batch.prompts, "the end")
        (slopes,) = torch.autograd.grad((loss * pairs.weights).mean(), log_probs)

        def on_step(view: StepView) -> None:
            slope = slopes[:, steps.index(view.index)].to(view.log_prob)
            ((slope * view.log_prob).sum() * context.weight).backward()

        context.sampler.replay(trajectory, on_step)
        r_hat = ((log_probs - base) * scale).detach().sum(1)
        gap = (r_hat[pairs.winners] - r_hat[pairs.losers]) * config.beta
        moved = ((log_probs - old).detach().abs() * (trajectory.dims if config.reduce == "sum" else 1)).mean()
        return {
            "loss": float((loss * pairs.weights).detach().mean()),
            # 1 when the log-ratios predict the rewards exactly, 0 at the base model.
            "explained": float((gap / (rewards[pairs.winners] - rewards[pairs.losers]).clamp(min=1e-8)).median()),
            "log_ratio_old": float(moved),
        }

    @staticmethod
    def _log_probs(trajectory: Trajectory, context: Context) -> Tensor:
        """Return ``(B, T)`` log-probs of the noisy steps under the weights in place, without gradients."""
        found: list[Tensor] = []
        context.sampler.replay(trajectory, lambda view: found.append(view.log_prob.double().cpu()), grad=False)
        return torch.stack(found, 1)
