r"""ReFL: reward feedback learning (Xu et al. 2023, ImageReward, arXiv 2304.05977).

Sample without gradients to a random late step m, predict the clean sample there with gradients, decode and score it:

.. math::  L = \lambda\,\max\big(0,\; 2 - r(\hat x_0(x_m), c)\big), \qquad
           \frac{\partial \hat x_0}{\partial \hat\epsilon} = -\frac{\sigma_m}{\alpha_m}.

No gradient reaches earlier steps, none at all flows once the (standardised) reward is 2, and later steps are not
sampled.

Which variant this is. The authors' code draws m from 30 ... 39 of 40 steps and does not use guidance
(``sampler.guidance_scale: 1``); one m serves a minibatch here. The paper's additional denoising loss on its
pre-training data is left out: there are no such data here. The prediction at m is blurrier than what the reward was
made for. On flow models x0-hat is x_t - t v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor

from difftune.algorithm import Batch, Context, GradientAlgorithm, GradientConfig, Shares, algorithm
from difftune.algorithms._steps import middle_step


class ReFLConfig(GradientConfig):
    """ReFL's settings; defaults are those of the authors' code."""

    weight_decay: float = Field(1e-2, ge=0, description="Decoupled weight decay (the authors').")
    loss: Literal["negative", "target", "hinge"] = Field(
        "hinge", description="hinge: max(0, target - r), no gradient above; negative: -r; target: |r - target|."
    )
    target: float | None = Field(2.0, description="The reward above which nothing is learnt (ImageReward's 2).")
    loss_scale: float = Field(1e-3, gt=0, description="Factor of the loss (the authors'); clipping may hide it.")
    step_range: Shares = Field(
        (0.75, 1.0), description="Share of the steps that m is drawn from (the authors': steps 30 to 39 of 40)."
    )


@algorithm("refl")
class ReFL(GradientAlgorithm):
    """ReFL; see the module's docstring."""

    paper = "ImageReward: Learning and Evaluating Human Preferences, Xu et al. 2023, arXiv 2304.05977"
    Config = ReFLConfig

    def draws(self, batch: Batch, context: Context) -> Iterator[tuple[Tensor, float]]:
        """Yield the picture predicted at a random late step."""
        sampler = context.sampler
        length = sampler.loop_length(batch.prompts, batch.keys, batch.conditions)
        m = middle_step(self.config.step_range, length, context.generator)
        images = sampler.backprop(
            batch.prompts, keys=batch.keys, conditions=batch.conditions, grad_steps=[m], stop=m
        )
        yield images, 1.0
