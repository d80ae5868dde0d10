r"""DPOK: policy optimisation with KL regularisation (Fan et al. 2023, arXiv 2305.16381).

The objective is the reward less the KL of whole trajectories to the base model, which is the sum of the steps' KLs and
an upper bound on the KL of the pictures:

.. math::  \max_\theta\; \mathbb E[r(x_0, c)] - \lambda \sum_t
           \mathrm{KL}\big(p_\theta(\cdot \mid x_t, c) \,\|\, p_{\mathrm{ref}}(\cdot \mid x_t, c)\big),

.. math::  L_t = -w_r\,(r - V)\,\mathrm{clamp}(w_t, 1-\epsilon, 1+\epsilon) + w_{kl}\,\mathrm{KL}_t .

The clamp is plain, not PPO's minimum: outside the band the reward's gradient is zero on *either* side, and the KL alone
pulls back.

Which variant this is. KL and log-probs are means over dimensions, and the KL is the exact one between the step's
Gaussians; the authors' published code was read except for the file of its KL, which is likely a squared difference of
noise predictions. V is a running mean of the prompt's rewards (``baseline: prompt``), that mean corrected by a network
that sees x_t, t and the prompt, fitted by squared error after each epoch (``value``, after the paper; a small network
of our own on averaged latents), or is left out. On flow models the same loss runs on the SDE's Gaussians.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from difftune.advantage import groups_of
from difftune.algorithm import (
    RATIO_METRICS,
    Batch,
    Context,
    Prepared,
    TransitionAlgorithm,
    TransitionConfig,
    add_kl,
    algorithm,
    ratio_stats,
)
from difftune.algorithms._value import ValueNet, features
from difftune.policy import Policy
from difftune.sampler import StepView
from difftune.transition import Gaussian
from difftune.types import RewardOutput


class DPOKConfig(TransitionConfig):
    """DPOK's settings; defaults are those of the authors' code for a single prompt."""

    lr: float = Field(1e-5, gt=0, description="Learning rate of AdamW (the authors', with a LoRA of rank 4).")
    max_grad_norm: float = Field(0.1, gt=0, description="Gradients are scaled down to this global norm (the authors').")
    clip_range: float = Field(1e-4, gt=0, description="Half-width of the clamp, in the unit of the mean log-prob.")
    reward_weight: float = Field(10.0, gt=0, description="w_r (the authors': 10 for one prompt, 1000 for many).")
    kl_weight: float = Field(
        0.01, ge=0, description="w_kl of the per-step KL, mean over dimensions (the authors': 0.01; many prompts 0.1)."
    )
    baseline: Literal["prompt", "value", "none"] = Field(
        "prompt",
        description="V: the mean of the prompt's latest rewards (of a prompt's first: of the epoch's), that mean "
        "corrected by a value network, or none.",
    )
    baseline_buffer: int = Field(64, ge=2, description="Rewards remembered per prompt (baseline: prompt and value).")
    value_lr: float = Field(1e-4, gt=0, description="Learning rate of the value network (the authors').")
    value_batch: int = Field(256, ge=1, description="Steps of samples per update of the value network (the authors').")
    value_steps: int = Field(5, ge=1, description="Updates of the value network per epoch (the authors').")
    value_buffer: int = Field(10_000, ge=1, description="Steps of samples that the value network remembers.")


def clamped_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Return ``(B,)`` -A clamp(w, 1 - eps, 1 + eps) with w = exp(log_prob - old_log_prob)."""
    ratio = torch.exp(log_prob - old_log_prob)
    return -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)


@algorithm("dpok")
class DPOK(TransitionAlgorithm):
    """DPOK; see the module's docstring."""

    paper = "DPOK: RL for Fine-tuning Text-to-Image Diffusion Models, Fan et al. 2023, arXiv 2305.16381"
    Config = DPOKConfig
    metrics = {
        **TransitionAlgorithm.metrics,
        **RATIO_METRICS,
        "value_error": "Squared error of the value network (with `baseline: value`).",
    }

    def __init__(self, config: DPOKConfig) -> None:
        super().__init__(config)
        self._seen: dict[str, deque[float]] = {}
        self._value = ValueNet(config.value_lr, config.value_buffer) if config.baseline == "value" else None

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``advantage`` ``(B,)``: rewards less the baseline, not standardised."""
        total = rewards.total.float()
        if self.config.baseline == "none":
            return Prepared({"advantage": total})
        advantage = torch.zeros_like(total)
        everywhere = total.double().mean()
        for group in groups_of(prompts):
            seen = self._seen.setdefault(prompts[group[0]], deque(maxlen=self.config.baseline_buffer))
            seen.extend(total[group].tolist())
            # In double precision, so that equal rewards have exactly their mean. A reward that is the first of its
            # prompt has nothing to be measured from but the others of the epoch.
            mean = torch.tensor(list(seen), dtype=torch.float64).mean() if len(seen) > 1 else everywhere
            advantage[group] = (total[group].double() - mean).float()
        return Prepared({"advantage": advantage})

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Replay the chosen steps; with a value network, their advantages are measured from it."""
        trajectory, value = batch.trajectory, self._value
        if value is None:
            return super().accumulate(batch, context)
        assert trajectory is not None
        advantage = batch.values["advantage"]

        def loss_of(view: StepView, reference: Gaussian | None) -> tuple[Tensor, dict[str, Tensor]]:
            rows = features(trajectory.states[:, view.index], context.sampler.level(view.timestep).sigma, batch.prompts)
            value.show(batch.keys, view.index, rows, advantage)
            predicted = value(rows).to(advantage)
            loss, stats = self.step_loss(view, {"advantage": advantage - predicted}, reference)
            return loss, {**stats, "value_error": (advantage - predicted).square()}

        return self.train_steps(batch, context, loss_of)

    def after_epoch(self, policy: Policy, step: int) -> None:
        """Fit the value network to the epoch's rewards."""
        if self._value is not None:
            self._value.fit(self.config.value_steps, self.config.value_batch)

    def step_loss(
        self, view: StepView, values: Mapping[str, Tensor], reference: Gaussian | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step's loss ``(B,)``, its ratio's metrics and its KL to the base model."""
        advantage = values["advantage"].to(view.log_prob.device)
        surrogate = clamped_loss(view.log_prob, view.old_log_prob, advantage, self.config.clip_range)
        loss = self.config.reward_weight * surrogate
        return add_kl(loss, ratio_stats(view, self.config.clip_range), view, reference, self.config.kl_weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered rewards and the value network."""
        state: dict[str, Any] = {"rewards": {prompt: list(values) for prompt, values in self._seen.items()}}
        return state if self._value is None else {**state, "value": self._value.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        size = self.config.baseline_buffer
        self._seen = {prompt: deque(values, maxlen=size) for prompt, values in state["rewards"].items()}
        if self._value is not None:
            self._value.load_state_dict(state["value"])
