r"""DRTune: deep reward tuning with stopped inputs (Wu et al. 2024, arXiv 2405.00760).

The denoiser sees every sample as a constant, so that the reward's gradient goes back to its outputs through the
scheduler's linear recursion alone and never through a Jacobian of the network,

.. math::  x_{k+1} = a_k x_k + b_k\, \epsilon_\theta(\mathrm{sg}(x_k)) + s_k z_k,

and only an evenly spaced subset of K steps is trained: early steps learn without exploding gradients. Sampling may
stop early, at a random step m, whose predicted clean sample is decoded and scored: r(x0-hat(x_m), c).

Which variant this is. Read from the paper's abstract and summaries; its numbers were not found, so the defaults are
our own, and the early stop is off (``stop_range``). The subset begins at a random step; steps and stop are drawn once a
minibatch. On flow models the recursion is Euler's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from difftune.algorithm import Batch, Context, GradientAlgorithm, GradientConfig, Shares, algorithm
from difftune.algorithms._steps import middle_step
from difftune.policy import Policy


class DRTuneConfig(GradientConfig):
    """DRTune's settings."""

    trained_steps: int = Field(4, ge=1, description="K, the evenly spaced steps that are trained (our default).")
    stop_range: Shares | None = Field(
        None, description="Share of the steps that m is drawn from, to stop early; null: all steps are sampled."
    )


def spaced_steps(count: int, steps: int, offset: float) -> list[int]:
    """Return ``count`` evenly spaced steps of ``steps``; ``offset`` in [0, 1) moves all of them within a spacing."""
    count = min(count, steps)
    return [int((i + offset) * steps / count) for i in range(count)]


@contextlib.contextmanager
def stopped_inputs(policy: Policy) -> Iterator[None]:
    """Detach whatever the denoisers are given, for the time of the block."""

    def detach(module: Any, args: Any, kwargs: Any) -> Any:
        return tuple(_detached(a) for a in args), {name: _detached(value) for name, value in kwargs.items()}

    handles = [m.register_forward_pre_hook(detach, with_kwargs=True) for m in policy.denoisers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    # Some transformers take lists of samples.
    return [_detached(item) for item in value] if isinstance(value, list) else value


@algorithm("drtune")
class DRTune(GradientAlgorithm):
    """DRTune; see the module's docstring."""

    paper = "Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models, Wu et al. 2024, arXiv 2405.00760"
    Config = DRTuneConfig

    def draws(self, batch: Batch, context: Context) -> Iterator[tuple[Tensor, float]]:
        """Yield one draw, differentiated at the chosen steps with their inputs held constant."""
        sampler = context.sampler
        length = sampler.loop_length(batch.prompts, batch.keys, batch.conditions)
        offset = float(torch.rand(1, generator=context.generator))
        bounds, stop = self.config.stop_range, None
        if bounds is not None:
            stop = middle_step(bounds, length, context.generator)
        count = length if stop is None else stop + 1
        steps = spaced_steps(self.config.trained_steps, count, offset)
        with stopped_inputs(context.policy):
            images = sampler.backprop(
                batch.prompts, keys=batch.keys, conditions=batch.conditions, grad_steps=steps, stop=stop
            )
        yield images, 1.0
