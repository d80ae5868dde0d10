r"""AWM: advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050).

The flow-matching error of a finished sample stands in for its log-prob, and the policy gradient is taken of it,

.. math::  \ell_\theta = -\,w(t)\,\overline{\lVert v - v_\theta(x_t) \rVert^2}, \qquad
           \rho = e^{\ell_\theta - \ell_{\mathrm{old}}}, \qquad L = -A\,\rho
           + \lambda_{\mathrm{ref}} \lVert v_\theta - v_{\mathrm{ref}} \rVert^2
           + \lambda_{\mathrm{ema}} \lVert v_\theta - v_{\mathrm{ema}} \rVert^2,

with the same noise and level for both errors. A sample with A < 0 has a loss without lower bound: the distances to
the base model and to a moving average of the weights give the objective an optimum.

Which variant this is. Ratios are clipped as in PPO; on-policy their value is 1 and the gradient that of -A times the
surrogate. ``weighting: ghuber`` is the authors' default, -t ((m + 1e-10)^0.25 - (1e-10)^0.25) / 0.25 of the mean square
error m; ``uniform``, ``t`` and ``t2`` are its alternatives. Advantages are measured from the group's mean, divided by
the std of the epoch, clipped to plus or minus 5 and scaled to plus or minus 1. The authors sample and train without
guidance (``sampler.guidance_scale: 1``), and train at the sampler's own noise levels (``timestep_sampling: sampler``).
On noise-prediction models the error is the noise's and t the level's sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from difftune.advantage import normalize_groups
from difftune.algorithm import (
    Batch,
    Point,
    Prepared,
    SampleAlgorithm,
    SampleConfig,
    algorithm,
    importance_sampling_loss,
    squared_error,
)
from difftune.policy import Policy
from difftune.types import RewardOutput


class AWMConfig(SampleConfig):
    """AWM's settings; defaults are those of the authors' code."""

    timesteps: int = Field(6, ge=1, description="Noise levels at which each sample is trained per update (paper: 6).")
    weighting: Literal["ghuber", "uniform", "t", "t2"] = Field(
        "ghuber", description="w(t) and the form of the error (the authors': ghuber of power 0.25)."
    )
    global_std: bool = Field(
        True, description="Divide advantages by the std of all rewards of the epoch (the authors'), or of the group."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to this size and divided by it.")
    clip_range: float = Field(1.0, gt=0, description="Clip range of the ratio (the authors': 1, on-policy).")
    kl_weight: float = Field(
        1e-3, ge=0, description="Weight of the mean squared distance to the base model (1e-4 with PickScore)."
    )
    ema_weight: float = Field(1.0, ge=0, description="Weight of the mean squared distance to the moving average.")
    decay_slope: float = Field(0.001, ge=0, description="Decay of the moving average per optimizer step taken so far.")
    decay_max: float = Field(0.3, ge=0, lt=1, description="Largest decay of the moving average.")


def surrogate_log_prob(error: Tensor, t: float, weighting: str) -> Tensor:
    """Return ``(B,)`` what stands for the log-prob of a sample with mean squared error ``(B,)`` at time ``t``."""
    if weighting == "ghuber":
        return -((error + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25
    return -error * {"uniform": 1.0, "t": t, "t2": t**2}[weighting]


@algorithm("awm")
class AWM(SampleAlgorithm):
    """AWM; see the module's docstring."""

    paper = "Advantage Weighted Matching: Aligning RL with Pretraining, Xue et al. 2025, arXiv 2509.25050"
    Config = AWMConfig
    compares = "standardises rewards"
    metrics = {
        **SampleAlgorithm.metrics,
        "ratio": "Ratio of the surrogate likelihoods to those of the weights that sampled; 1 in the first update.",
        "error": "Squared error on the samples, mean over dimensions.",
        "reference_distance": "Mean squared distance to the base model's prediction (with `kl_weight` above 0).",
        "ema_distance": "Mean squared distance to the moving average's prediction (with `ema_weight` above 0).",
    }

    def setup(self, policy: Policy) -> None:
        """Begin with the moving average and the sampling policy at the current weights."""
        policy.store_adapter("ema")
        policy.store_adapter("rollout")

    def adapters(self) -> tuple[str, ...]:
        """Return the policy that sampled, and those that the loss holds to."""
        names = ["rollout"]
        if self.config.kl_weight > 0:
            names.append("reference")
        if self.config.ema_weight > 0:
            names.append("ema")
        return tuple(names)

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``advantage`` ``(B,)`` in [-1, 1]."""
        bound = self.config.advantage_clip
        advantage = normalize_groups(rewards.total, prompts, self.config.global_std)
        return Prepared({"advantage": advantage.clamp(-bound, bound) / bound})

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(B,)``, their ratio and their distances."""
        config, t = self.config, point.level.sigma
        new = surrogate_log_prob(point.error(), t, config.weighting)
        old = surrogate_log_prob(point.error("rollout"), t, config.weighting)
        advantage = batch.values["advantage"].to(new)
        loss = importance_sampling_loss(new, old, advantage, config.clip_range)
        stats = {"ratio": (new - old).detach().exp(), "error": point.error().detach()}
        for name, weight in (("reference", config.kl_weight), ("ema", config.ema_weight)):
            if weight > 0:
                distance = squared_error(point.predicted, point.others[name], point.space)
                loss = loss + weight * distance
                stats[f"{name}_distance"] = distance.detach()
        return loss, stats

    def after_step(self, policy: Policy, step: int) -> None:
        """Let the moving average follow."""
        policy.update_adapter("ema", min(self.config.decay_slope * step, self.config.decay_max))

    def after_epoch(self, policy: Policy, step: int) -> None:
        """The weights that draw the next rollout are the ones that its ratios are to."""
        policy.store_adapter("rollout")
