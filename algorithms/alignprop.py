r"""AlignProp: backpropagation of the reward through the sampler (Prabhudesai et al. 2023, arXiv 2310.03739).

The pictures are a differentiable function of the weights, so the reward's own gradient is followed,

.. math::  \min_\theta\; \mathbb E\big[\ell(r(x_0(\theta), c))\big],

through the last K steps only, K drawn at random: at earlier steps the model's *output* is a constant, while the sample
still carries the graph through the scheduler's linear terms. Through all steps the model collapses within epochs.
Activations of the denoiser are recomputed in the backward pass (checkpointing): memory of one call, not of T.

Which variant this is. The first differentiated step is drawn as in the authors' code: ``gaussian``, about 42 of 50 (sd
5, drawn again outside 1 ... 49), ``uniform`` over all steps (the paper's K ~ U(0, T)), or ``fixed``. One draw serves a
minibatch. The guidance is differentiated, as the pipeline computes it; noise is a constant. The authors' losses are
1 - r (here ``negative``, the same gradient) and, for aesthetics, |r - 10| (``target``), both times 0.01. On flow
models, which the paper does not treat, the steps of the ODE or SDE are differentiated in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from difftune.algorithm import Batch, Context, GradientAlgorithm, GradientConfig, algorithm


class AlignPropConfig(GradientConfig):
    """AlignProp's settings; defaults are those of the authors' code."""

    lr: float = Field(1e-3, gt=0, description="Learning rate of AdamW (the authors', LoRA).")
    loss_scale: float = Field(0.01, gt=0, description="Factor of the loss (the authors'); clipping may hide it.")
    truncation: Literal["gaussian", "uniform", "fixed", "none"] = Field(
        "gaussian", description="How the first differentiated step is drawn; none differentiates all steps."
    )
    truncation_mean: float = Field(0.84, ge=0, le=1, description="Mean of the gaussian, a share of the steps (42/50).")
    truncation_std: float = Field(0.1, gt=0, description="Standard deviation of the gaussian, as a share (5 / 50).")
    truncation_steps: int = Field(1, ge=1, description="K, the last steps that are differentiated (truncation: fixed).")


def first_step(config: AlignPropConfig, steps: int, generator: torch.Generator) -> int:
    """Return the first differentiated step, from 0 to ``steps`` - 1: K is ``steps`` less that."""
    if config.truncation == "none" or steps == 1:
        return 0
    if config.truncation == "fixed":
        return max(steps - config.truncation_steps, 0)
    if config.truncation == "uniform":
        return int(torch.randint(steps, (1,), generator=generator))
    for _ in range(100):
        share = config.truncation_mean + config.truncation_std * float(torch.randn(1, generator=generator))
        index = int(share * steps)
        if 1 <= index <= steps - 1:
            return index
    return steps - 1


@algorithm("alignprop")
class AlignProp(GradientAlgorithm):
    """AlignProp; see the module's docstring."""

    paper = "Aligning Text-to-Image Diffusion with Reward Backpropagation, Prabhudesai et al. 2023, arXiv 2310.03739"
    Config = AlignPropConfig

    def draws(self, batch: Batch, context: Context) -> Iterator[tuple[Tensor, float]]:
        """Yield one draw, differentiated from a random step on."""
        sampler = context.sampler
        count = sampler.loop_length(batch.prompts, batch.keys, batch.conditions)
        steps = range(first_step(self.config, count, context.generator), count)
        yield sampler.backprop(batch.prompts, keys=batch.keys, conditions=batch.conditions, grad_steps=steps), 1.0
