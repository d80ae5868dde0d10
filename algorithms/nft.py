r"""DiffusionNFT: online reinforcement on the forward process (Zheng et al. 2025, arXiv 2509.16117).

No log-probs and any sampler: an *old* policy draws samples, and the trained one is pulled towards the good and pushed
from the bad ones, along the way from the old prediction to its own. With r in [0, 1] and beta the step of that way,

.. math::  v^+ = (1-\beta)\,v_{\mathrm{old}} + \beta\,v_\theta, \qquad
           v^- = (1+\beta)\,v_{\mathrm{old}} - \beta\,v_\theta,

.. math::  L = \tfrac{c}{\beta}\big[\, r\,\lVert \hat x_0(v^+) - x_0 \rVert^2
               + (1-r)\,\lVert \hat x_0(v^-) - x_0 \rVert^2 \big]
               + \lambda\, \lVert v_\theta - v_{\mathrm{ref}} \rVert^2, \qquad
           r = \tfrac12 + \tfrac12\,\mathrm{clip}(A / c, \pm 1).

The old policy follows by a moving average whose decay grows with the optimizer steps, min(0.001 step, 0.5).

Which variant this is. Errors are means over dimensions; each of the two is divided by its own mean absolute error, held
constant (``self_normalize``), as in the authors' code: this changes the minimiser, so it is a setting. The advantage A
is the group's with the std of the whole epoch. The authors sample and train without guidance
(``sampler.guidance_scale: 1``). On noise-prediction models predictions are mixed in the space of x0, which is linear in
either; errors of x0 weigh high noise more than those of the noise do.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from difftune.advantage import groups_of, normalize_groups
from difftune.algorithm import Batch, Point, Prepared, SampleAlgorithm, SampleConfig, algorithm, squared_error
from difftune.policy import Policy
from difftune.types import RewardOutput


class NFTConfig(SampleConfig):
    """DiffusionNFT's settings; defaults are those of the authors' SD3.5 recipes."""

    beta: float = Field(1.0, gt=0, description="Step from the old prediction to the new (the authors': 1, or 0.1).")
    advantage_clip: float = Field(5.0, gt=0, description="c: advantages of plus or minus this are r = 1 and r = 0.")
    kl_weight: float = Field(1e-4, ge=0, description="Weight of the mean squared distance to the base model.")
    self_normalize: bool = Field(True, description="Divide each error by its own mean absolute error (the authors').")
    decay_start: int = Field(
        0, ge=0, description="Optimizer steps before the decay grows (the authors' second form: 75, 0.0075, 0.999)."
    )
    decay_slope: float = Field(0.001, ge=0, description="Decay of the old policy per optimizer step since then.")
    decay_max: float = Field(0.5, ge=0, lt=1, description="Largest decay of the old policy; 0: no memory.")


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """Return r ``(B,)`` in [0, 1]: 1/2 + 1/2 clip(A / clip, -1, 1)."""
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def mixtures(predicted: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the implicit positive and negative predictions: old plus and minus beta times (predicted - old)."""
    return (1 - beta) * old + beta * predicted, (1 + beta) * old - beta * predicted


def contrastive_loss(
    predicted: Tensor, old: Tensor, x0: Tensor, r: Tensor, beta: float, self_normalize: bool = True
) -> Tensor:
    """Return ``(B,)`` (r |x0+ - x0|^2 + (1 - r) |x0- - x0|^2) / beta of predicted clean samples ``(B, *latent)``."""
    positive, negative = mixtures(predicted, old, beta)

    def error(mixture: Tensor) -> Tensor:
        difference = (mixture - x0).flatten(1)
        if not self_normalize:
            return difference.square().mean(1)
        return difference.square().mean(1) / difference.detach().abs().mean(1).clamp(min=1e-5)

    return (r * error(positive) + (1 - r) * error(negative)) / beta


@algorithm("nft")
class NFT(SampleAlgorithm):
    """DiffusionNFT; see the module's docstring."""

    paper = "DiffusionNFT: Online Diffusion Reinforcement with Forward Process, Zheng et al. 2025, arXiv 2509.16117"
    Config = NFTConfig
    compares = "standardises rewards"
    metrics = {
        **SampleAlgorithm.metrics,
        "old_distance": "Mean squared distance of the policy's prediction to the old policy's.",
        "reference_distance": "Mean squared distance to the base model's prediction (with `kl_weight` above 0).",
    }
    behaviour = "old"

    def setup(self, policy: Policy) -> None:
        """Begin with the old policy at the current weights."""
        policy.store_adapter("old")

    def adapters(self) -> tuple[str, ...]:
        """Return the old policy, and the base model where the loss holds to it."""
        return ("old", "reference") if self.config.kl_weight > 0 else ("old",)

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``optimality`` ``(B,)`` in [0, 1]; prompts of equal rewards, which say nothing, are left out."""
        advantage = normalize_groups(rewards.total, prompts, global_std=True)
        r = optimality(advantage, self.config.advantage_clip)
        told = [[i] for group in groups_of(prompts) if bool(advantage[group].any()) for i in group]
        return Prepared({"advantage": advantage, "optimality": r}, told)

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(B,)``, and how far the policy is from the old and the base one."""
        config, x0 = self.config, point.predicted.x0
        r = batch.values["optimality"].to(x0)
        loss = contrastive_loss(x0, point.others["old"].x0, point.truth.x0, r, config.beta, config.self_normalize)
        loss = config.advantage_clip * loss
        stats = {"old_distance": squared_error(point.predicted, point.others["old"], point.space).detach()}
        if config.kl_weight > 0:
            distance = squared_error(point.predicted, point.others["reference"], point.space)
            loss = loss + config.kl_weight * distance
            stats["reference_distance"] = distance.detach()
        return loss, stats

    def after_epoch(self, policy: Policy, step: int) -> None:
        """Let the old policy follow."""
        since = max(step - self.config.decay_start, 0)
        policy.update_adapter("old", min(self.config.decay_slope * since, self.config.decay_max))
