r"""RWR: reward-weighted regression on the model's own samples (Peters & Schaal 2007; for diffusion, Black et al. 2023).

Samples of the current model are fitted again, each with a weight that grows with its reward,

.. math::  L = w \, \lVert \epsilon - \epsilon_\theta(x_t, t, c) \rVert^2, \qquad
           w_i = N\,\frac{e^{\beta r_i}}{\sum_j e^{\beta r_j}},

with the velocity in place of the noise on flow models (Flow-RWR; Liu et al. 2025, VideoAlign, which drops the factor
(1 - t)^2 between the two errors). Without sampling error the fit is the model tilted by e^{beta r}.

Which variant this is, and how popular code differs. ``beta`` *multiplies* the reward, as in the DDPO authors' JAX code
(0.2 there); a temperature T that divides is beta = 1 / T. ``weights: softmax`` is theirs, over the batch or per prompt;
``weights: exp`` is Flow-RWR's plain exp(beta r), whose size depends on the reward's offset; ``weights: sparse`` is
RWR-sparse: only samples above a quantile, all with weight 1. Errors are means over dimensions. The guided prediction is
fitted, as in the JAX code (``fit_guidance: 1`` fits the bare one, as Flow-RWR does). One pass over a rollout is the
default here; the authors make 5 (50 for RWR-sparse) over rounds of 10,240 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from difftune.advantage import above_quantile, exponential_weights
from difftune.algorithm import Batch, Point, Prepared, SampleAlgorithm, SampleConfig, algorithm
from difftune.types import RewardOutput


class RWRConfig(SampleConfig):
    """RWR's settings."""

    beta: float = Field(
        0.2, gt=0, description="Multiplies the reward in the exponent (0.2: the DDPO authors' JAX code; Flow-RWR: 1)."
    )
    weights: Literal["softmax", "exp", "sparse"] = Field(
        "softmax", description="softmax: mean 1 (RWR); exp: not centred (Flow-RWR); sparse: 1 above a quantile, else 0."
    )
    per_prompt: bool = Field(
        False, description="Normalise softmax weights within each prompt (the authors do for their aesthetic reward)."
    )
    quantile: float = Field(
        0.9, ge=0, lt=1, description="Samples with rewards above this quantile of the epoch are kept (sparse; paper)."
    )


def weighted_error(error: Tensor, weight: Tensor) -> Tensor:
    """Return ``(B,)`` weight times error."""
    return weight.to(error) * error


@algorithm("rwr")
class RWR(SampleAlgorithm):
    """RWR; see the module's docstring."""

    paper = "Training Diffusion Models with Reinforcement Learning (RWR baseline), Black et al. 2023, arXiv 2305.13301"
    Config = RWRConfig
    metrics = {
        **SampleAlgorithm.metrics,
        "error": "Squared error before it is weighted, mean over dimensions.",
        "weight": "Mean weight of the samples that are trained on.",
    }

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``weight`` ``(B,)``; samples of weight 0 are left out."""
        if self.config.weights == "sparse":
            weight = above_quantile(rewards.total, self.config.quantile)
            return Prepared({"weight": weight}, [[i] for i in weight.nonzero().flatten().tolist()])
        if self.config.weights == "exp":
            return Prepared({"weight": torch.exp(self.config.beta * rewards.total.float())})
        per_prompt = prompts if self.config.per_prompt else None
        return Prepared({"weight": exponential_weights(rewards.total, self.config.beta, per_prompt)})

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted errors ``(B,)``."""
        error = point.error()
        weight = batch.values["weight"]
        return weighted_error(error, weight), {"error": error.detach(), "weight": weight}
