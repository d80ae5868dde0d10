r"""RAFT: fine-tuning on the best of K samples (Dong et al. 2023, arXiv 2304.06767).

Draw K samples per prompt from the current model, keep the best by reward, fit them as data, and begin again:

.. math::  i^* = \arg\max_{i \le K} r(x_0^i, c), \qquad
           L = \lVert \epsilon - \epsilon_\theta(x_t^{i^*}, t, c) \rVert^2 .

Choosing the best of K moves a distribution with continuous rewards by a KL of exactly log K - (K - 1) / K
(:func:`best_of_kl`), so ``samples_per_prompt`` is how far one round can go.

Which variant this is. The paper's diffusion experiments do not state all of their settings; the defaults of the
noise levels are this package's. On flow models the error is the velocity's. Prompts whose samples all score the same
are left out: their best says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from difftune.advantage import best_of_groups, preference_units
from difftune.algorithm import BareConfig, Batch, Plan, Point, Prepared, SampleAlgorithm, algorithm
from difftune.reward import Reward
from difftune.sampler import Sampler
from difftune.types import RewardOutput, UserError


class RAFTConfig(BareConfig):
    """RAFT's settings."""

    keep: int = Field(1, ge=1, description="Samples kept per prompt, the best first (paper: 1).")


def best_of_kl(count: int) -> float:
    """Return KL(best of ``count`` || one sample) in nats: log K - (K - 1) / K, for continuous rewards."""
    return math.log(count) - (count - 1) / count


@algorithm("raft")
class RAFT(SampleAlgorithm):
    """RAFT; see the module's docstring."""

    paper = "RAFT: Reward rAnked FineTuning, Dong et al. 2023, arXiv 2304.06767"
    Config = RAFTConfig
    compares = "chooses the best"
    metrics = {
        **SampleAlgorithm.metrics,
        "error": "Squared error on the kept samples, mean over dimensions: the loss itself.",
        "kept_reward": "Mean reward of the kept samples.",
    }

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse runs in which there is nothing to choose from."""
        super().check(sampler, reward, plan)
        if self.config.keep >= plan.samples_per_prompt:
            raise UserError(
                f"algorithm.keep: got {self.config.keep}, expected fewer than the {plan.samples_per_prompt} samples "
                "per prompt; raise train.samples_per_prompt"
            )

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Keep the best samples of each prompt, and remember their rewards."""
        total = rewards.total.float()
        apart = {prompts[unit[0]] for unit in preference_units(total, prompts)}
        chosen = [i for i in best_of_groups(total, prompts, self.config.keep) if prompts[i] in apart]
        return Prepared({"reward": total}, [[i] for i in chosen])

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the errors ``(B,)`` of the kept samples."""
        error = point.error()
        return error, {"error": error.detach(), "kept_reward": batch.values["reward"]}
