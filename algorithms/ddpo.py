r"""DDPO: denoising diffusion policy optimisation (Black, Janner, Du, Kostrikov & Levine 2023, arXiv 2305.13301).

Denoising is a decision process: the state is (c, t, x_t), the action x_{t-1}, the reward r(x_0, c) comes at the end.
With A the standardised reward, ``score_function`` is the paper's DDPO_SF (eq. 3), one on-policy step per rollout,

.. math::  L_t = -A \, \log p_\theta(x_{t-1} \mid x_t, c),

and ``importance_sampling`` is DDPO_IS (eq. 4) with PPO's clipping,

.. math::  w_t = \frac{p_\theta(x_{t-1} \mid x_t, c)}{p_{\mathrm{old}}(x_{t-1} \mid x_t, c)}, \qquad
           L_t = \max\big(-A\,w_t,\; -A\,\mathrm{clip}(w_t, 1-\epsilon, 1+\epsilon)\big).

Which variant this is, and how popular code differs. Log-probs are *means* over the latent's dimensions, as in
ddpo-pytorch and its descendants: w_t is the d-th root of the true ratio, and the clip range 1e-4 belongs to that unit.
Losses are averaged over steps (ddpo-pytorch sums their gradients before one optimizer step; AdamW makes that the same
up to ``max_grad_norm``). Steps are drawn per micro-batch, not per sample. Guidance is on in training, because the
replay runs the pipeline's own guided call. The optional KL term, w KL(p_theta || p_ref) per step with exact Gaussians,
is DPOK's (Fan et al. 2023) and is not in the DDPO paper. On flow models, which the paper does not treat, the same loss
runs on the SDE's Gaussians.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from difftune.advantage import PromptStatistics, normalize_batch, normalize_groups
from difftune.algorithm import (
    RATIO_METRICS,
    Plan,
    Prepared,
    TransitionAlgorithm,
    TransitionConfig,
    add_kl,
    algorithm,
    importance_sampling_loss,
    ratio_stats,
)
from difftune.reward import Reward
from difftune.sampler import Sampler, StepView
from difftune.transition import Gaussian
from difftune.types import RewardOutput, UserError


class DDPOConfig(TransitionConfig):
    """DDPO's settings; defaults are those of the authors' LoRA code (ddpo-pytorch) unless said otherwise."""

    variant: Literal["importance_sampling", "score_function"] = Field(
        "importance_sampling", description="DDPO_IS (clipped ratio) or DDPO_SF (log-prob times advantage, on-policy)."
    )
    clip_range: float = Field(
        1e-4, gt=0, description="Clip range of the ratio, in the unit of the mean log-prob per dimension."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to plus or minus this.")
    normalize: Literal["prompt", "group", "batch"] = Field(
        "prompt",
        description="Standardise rewards by running statistics per prompt (the paper), within each prompt's group of "
        "the epoch (GRPO), or over the whole batch.",
    )
    prompt_buffer: int = Field(32, ge=2, description="Rewards remembered per prompt (normalize: prompt).")
    prompt_min_count: int = Field(
        16, ge=2, description="Below this many remembered rewards a prompt uses the batch's mean and std."
    )
    kl_weight: float = Field(
        0.0, ge=0, description="Weight of the per-step KL to the base model, mean over dimensions (0: none, the paper)."
    )

    @model_validator(mode="after")
    def _reachable(self) -> DDPOConfig:
        if self.normalize == "prompt" and self.prompt_min_count > self.prompt_buffer:
            raise ValueError(
                f"prompt_min_count is {self.prompt_min_count}, more than the {self.prompt_buffer} rewards that "
                "prompt_buffer keeps: the statistics would never be used"
            )
        return self


def score_function_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Return DDPO_SF's loss ``(B,)``: -A log p."""
    return -advantage * log_prob


@algorithm("ddpo")
class DDPO(TransitionAlgorithm):
    """DDPO; see the module's docstring."""

    paper = "Training Diffusion Models with Reinforcement Learning, Black et al. 2023, arXiv 2305.13301"
    Config = DDPOConfig
    metrics = {**TransitionAlgorithm.metrics, **RATIO_METRICS}

    def __init__(self, config: DDPOConfig) -> None:
        super().__init__(config)
        self.statistics = PromptStatistics(config.prompt_buffer, config.prompt_min_count)

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse group normalisation of single samples, and off-policy use of the score-function variant."""
        super().check(sampler, reward, plan)
        if self.config.normalize == "group" and plan.samples_per_prompt < 2:
            raise UserError(
                "algorithm.normalize: group standardises within a prompt's samples, and samples_per_prompt is "
                f"{plan.samples_per_prompt}; set train.samples_per_prompt to 2 or more, or normalize: batch"
            )
        if self.config.variant == "score_function" and (self.config.inner_epochs > 1 or plan.updates_per_epoch > 1):
            raise UserError(
                "algorithm.variant: score_function is right for one update per rollout only; set "
                "train.updates_per_epoch and algorithm.inner_epochs to 1, or use importance_sampling"
            )

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``advantage`` ``(B,)``, standardised and clipped."""
        if self.config.normalize == "prompt":
            advantage = self.statistics.update(prompts, rewards.total)
        elif self.config.normalize == "group":
            advantage = normalize_groups(rewards.total, prompts)
        else:
            advantage = normalize_batch(rewards.total)
        bound = self.config.advantage_clip
        return Prepared({"advantage": advantage.clamp(-bound, bound)})

    def step_loss(
        self, view: StepView, values: Mapping[str, Tensor], reference: Gaussian | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step's loss ``(B,)`` and its ratio, clip fraction and approximate KL to the old policy."""
        advantage = values["advantage"].to(view.log_prob.device)
        if self.config.variant == "score_function":
            loss = score_function_loss(view.log_prob, advantage)
        else:
            loss = importance_sampling_loss(view.log_prob, view.old_log_prob, advantage, self.config.clip_range)
        return add_kl(loss, ratio_stats(view, self.config.clip_range), view, reference, self.config.kl_weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the per-prompt statistics."""
        return {"statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the per-prompt statistics."""
        self.statistics.load_state_dict(state["statistics"])
