r"""GRPO: group-relative policy optimisation of flow and diffusion models (Liu et al. 2025, arXiv 2505.05470).

The advantage of a sample is how it stands among the other samples of its prompt; the policy gradient is PPO's, at every
noisy step of the sampler's SDE, with a KL to the base model:

.. math::  A_i = \frac{r_i - \mathrm{mean}(r_{\mathrm{group}})}{\mathrm{std}(r)}, \qquad
           w_t = \frac{p_\theta(x_s \mid x_t, c)}{p_{\mathrm{old}}(x_s \mid x_t, c)},

.. math::  L_t = \max\big(-A\,w_t,\; -A\,\mathrm{clip}(w_t, 1-\epsilon, 1+\epsilon)\big)
                 + \lambda\,\mathrm{KL}\big(p_\theta(\cdot \mid x_t) \,\|\, p_{\mathrm{ref}}(\cdot \mid x_t)\big).

The published variants are settings:

- Flow-GRPO: the defaults, with ``sampler.dynamics: flow_sde`` (``sampler.eta`` 0.7) and 10 steps.
- Flow-GRPO-Fast, MixGRPO: ``sampler.window`` with the few steps that carry noise, the others being ODE steps: of
  ``kind: random``, or of ``kind: sliding`` (MixGRPO: size 4 of 25 steps, every 25 epochs). MixGRPO also standardises
  several rewards apart before adding them (``mix: parts``).
- DanceGRPO (Xue et al. 2025): ``sampler.dynamics: dance_sde`` (eta 0.3), ``sampler.initial_noise: prompt``,
  ``global_std: false``, ``kl_weight: 0``, ``timestep_fraction: 0.6``.
- CPS (Wang & Yu 2025): ``sampler.dynamics: cps``.
- GRPO-Guard (Wang et al. 2025, arXiv 2510.22319): ``ratio: guard``, log-ratios freed of their bias and of the step's
  noise level, and each step's policy loss divided by the time it takes (one more forward pass a step, of mu_old),

.. math::  \log \tilde w_t = S_t \Big(\log w_t + \frac{\lVert\mu_\theta - \mu_{\mathrm{old}}\rVert^2}{2 S_t^2}\Big),
           \qquad L_t = \frac{1}{|\Delta t|}
           \max\big(-A\,\tilde w_t,\; -A\,\mathrm{clip}(\tilde w_t, 1-\epsilon, 1+\epsilon)\big).

Which unit, and how popular code differs. Log-probs and KLs are means over dimensions, as in their code: the clip range
belongs to that unit. The KL is the exact one between the step's Gaussians; flow_grpo's code leaves a factor |dt| out of
the divisor, so its weight 0.04 is 0.04 |dt| = 0.004 here, at its 10 training steps. Standard deviations are the
population's (DanceGRPO's are the sample's). The guard's formula was read in re-implementations of the authors' code. On
noise-prediction models the same loss runs on DDIM's Gaussians, and |dt| is the fall of the noise level sigma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from difftune.advantage import normalize_groups
from difftune.algorithm import (
    RATIO_METRICS,
    Batch,
    Context,
    Plan,
    Prepared,
    TransitionAlgorithm,
    TransitionConfig,
    add_kl,
    algorithm,
    importance_sampling_loss,
    ratio_stats,
)
from difftune.policy import Policy
from difftune.reward import Reward, WeightedReward
from difftune.sampler import Sampler, StepView
from difftune.transition import Gaussian
from difftune.types import RewardOutput, Trajectory, UserError


class GRPOConfig(TransitionConfig):
    """GRPO's settings; defaults are Flow-GRPO's (its SD3.5 recipes) unless said otherwise."""

    clip_range: float = Field(1e-4, gt=0, description="Clip range of the ratio, in the unit of the mean log-prob.")
    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to plus or minus this.")
    global_std: bool = Field(
        True, description="Divide by the std of all rewards of the epoch (Flow-GRPO) or of the group (DanceGRPO)."
    )
    mix: Literal["total", "parts"] = Field(
        "total",
        description="Standardise the reward's total, or each of its terms apart and add them up by weight (MixGRPO).",
    )
    kl_weight: float = Field(
        0.004, ge=0, description="Weight of the KL to the base model, mean over dimensions (0.04 |dt|: see above)."
    )
    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the noisy steps trained, at random (Flow-GRPO 0.99, DanceGRPO 0.6)."
    )
    ratio: Literal["plain", "guard"] = Field("plain", description="The ratio itself, or GRPO-Guard's normalised one.")


def guarded_log_ratio(
    log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: float, mask: Tensor | None = None
) -> Tensor:
    """Return GRPO-Guard's log-ratio ``(B,)``: std * (log w + mean over dimensions of (mu - mu_old)^2 / (2 std^2)).

    The log-ratio of a Gaussian step is -(mu - mu_old)^2 / (2 std^2) + z (mu - mu_old) / std: what is left is
    z (mu - mu_old), without bias and of one scale at all steps. Where ``mask`` is False the pipeline overwrites what
    was drawn: those dimensions are no part of the log-ratio, and hence not of its bias.
    """
    shift = (mean - old_mean).square()
    bias = (shift if mask is None else shift * mask).flatten(1).mean(1) / (2 * std**2)
    return std * (log_ratio + bias)


def step_size(sampler: Sampler, trajectory: Trajectory, view: StepView) -> float:
    """Return |dt| of a step: by how much the noise level sigma falls, which is time itself on flow models."""
    following = view.index + 1
    last = following == trajectory.num_steps
    end = 0.0 if last else sampler.level(float(trajectory.times[following])).sigma
    return sampler.level(view.timestep).sigma - end


@algorithm("grpo")
class GRPO(TransitionAlgorithm):
    """GRPO; see the module's docstring."""

    paper = "Flow-GRPO: Training Flow Matching Models via Online RL, Liu et al. 2025, arXiv 2505.05470"
    Config = GRPOConfig
    compares = "standardises rewards"
    metrics = {**TransitionAlgorithm.metrics, **RATIO_METRICS}

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self._weights: dict[str, float] = {}

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse terms that are standardised apart where there are none, and note their weights."""
        super().check(sampler, reward, plan)
        if self.config.mix == "parts" and isinstance(reward, WeightedReward):
            self._weights = {name: weight for name, weight, _ in reward.terms}
        elif self.config.mix == "parts" and isinstance(reward, Reward):
            # Before weights are loaded, a configuration is checked with what only looks like a reward.
            raise UserError(
                f"algorithm.mix: parts standardises the terms of a sum, and {reward.name!r} is none; use a list of "
                "rewards, or mix: total"
            )

    def setup(self, policy: Policy) -> None:
        """Keep the weights that draw the first rollout, which the guard compares with."""
        if self.config.ratio == "guard":
            policy.store_adapter("rollout")

    def after_epoch(self, policy: Policy, step: int) -> None:
        """Keep those that draw the next one."""
        self.setup(policy)

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``advantage`` ``(B,)``, standardised within groups and clipped."""
        terms = self._terms(rewards)
        advantage = torch.stack([w * normalize_groups(r, prompts, self.config.global_std) for w, r in terms])
        bound = self.config.advantage_clip
        return Prepared({"advantage": advantage.sum(0).clamp(-bound, bound)})

    def _terms(self, rewards: RewardOutput) -> list[tuple[float, Tensor]]:
        """Return what is standardised, with its weight: the total, or the terms of the weighted sum."""
        if self.config.mix == "total":
            return [(1.0, rewards.total)]
        # A weighted sum also lists the parts of its terms, as term/part: those are in the term already.
        weights = self._weights or {name: 1.0 for name in rewards.parts if "/" not in name}
        if not weights:
            raise UserError("algorithm.mix: parts needs a reward with parts; use a list of rewards, or mix: total")
        return [(weight, rewards.parts[name]) for name, weight in weights.items()]

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Replay the chosen steps, with the old policy's means at hand where the guard needs them."""
        trajectory = batch.trajectory
        assert trajectory is not None
        if self.config.ratio == "plain":
            return super().accumulate(batch, context)
        steps = context.choose_steps(trajectory, self.config.timestep_fraction)
        # Computed anew: what was recorded is rounded to the sample's dtype, and in bf16 its square, as the bias, would
        # put every ratio above the clip range before anything is learnt.
        with context.policy.adapter("rollout"):
            old = context.sampler.transitions(trajectory, steps)

        def loss_of(view: StepView, reference: Gaussian | None) -> tuple[Tensor, dict[str, Tensor]]:
            old_mean = old[view.index].mean.to(view.mean.device)
            return self.step_loss(view, batch.values, reference, old_mean, step_size(context.sampler, trajectory, view))

        return self.train_steps(batch, context, loss_of, steps)

    def step_loss(
        self,
        view: StepView,
        values: Mapping[str, Tensor],
        reference: Gaussian | None,
        old_mean: Tensor | None = None,
        dt: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step's loss ``(B,)``, its ratio's metrics and its KL to the base model.

        The guard gives the mean of the policy that sampled, and the step's size.
        """
        advantage = values["advantage"].to(view.log_prob.device)
        log_ratio = view.log_prob - view.old_log_prob
        if old_mean is not None:
            log_ratio = guarded_log_ratio(log_ratio, view.mean, old_mean, view.std, view.gaussian.mask)
        loss = importance_sampling_loss(log_ratio, torch.zeros_like(log_ratio), advantage, self.config.clip_range) / dt
        stats = ratio_stats(view, self.config.clip_range, log_ratio)
        return add_kl(loss, stats, view, reference, self.config.kl_weight)
