r"""Adjoint matching: reward fine-tuning as stochastic control (Domingo-Enrich et al. 2024, arXiv 2409.08861).

With memoryless noise, the control that turns the base model into its tilt p_ref e^{lambda r} is known step by step: the
drift must move by minus the noise's variance times the *lean adjoint*, the gradient of the reward carried back through
the base model,

.. math::  \tilde a_T = -\lambda \nabla r(x_0), \qquad
           \tilde a_k = \tilde a_{k+1} + \nabla_x\big[(\mu_{\mathrm{base}}(x_k) - x_k)^\top \tilde a_{k+1}\big],

.. math::  L = \sum_k \Big\lVert \frac{\mu_\theta(x_k) - \mu_{\mathrm{base}}(x_k)}{S_k}
               + S_k\, \tilde a_{k+1} \Big\rVert^2 .

The adjoint is a target, not a graph: nothing is differentiated through the fine-tuned model's trajectory.

Which variant this is, and how popular code differs. Steps are regressed on the adjoint *after* them, which is the
exact discrete optimum (the authors' code takes the one before, an error of order dt). Losses are means over dimensions
and steps; the authors' clipping at a running quantile of the loss and their buffer are left out. Memoryless noise is
DDIM with eta 1, and on flow models ``flow_sde`` with eta sqrt 2: where ``sampler.eta`` is left open it is that; any
other noise gives a biased tilt and is refused. The adjoint goes through the pipeline's own guided call, so guidance
belongs to the base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from difftune.algorithm import Batch, Context, Plan, Prepared, TransitionAlgorithm, TransitionConfig, algorithm
from difftune.reward import Reward
from difftune.sampler import Sampler, StepView
from difftune.transition import Gaussian, working
from difftune.types import RewardOutput, Trajectory, UserError


class AdjointMatchingConfig(TransitionConfig):
    """Adjoint matching's settings; defaults are those of the authors' code unless said otherwise."""

    lr: float = Field(3e-6, gt=0, description="Learning rate of AdamW (the authors', for the full UNet).")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas (the authors').")
    reward_scale: float = Field(100.0, gt=0, description="lambda, which multiplies the reward (the authors': 100).")
    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the noisy steps regressed, drawn at random (the authors': 4 of 50)."
    )


def matching_loss(
    mean: Tensor, base_mean: Tensor, std: float, adjoint: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return ``(B,)`` mean over dimensions of ((mu - mu_base) / S + S a)^2, with the adjoint after the step.

    Where ``mask`` is False the pipeline overwrites what was drawn: nothing is to be matched there.
    """
    error = ((mean - base_mean) / std + std * adjoint).square()
    return (error if mask is None else error * mask).flatten(1).mean(1)


@algorithm("adjoint_matching")
class AdjointMatching(TransitionAlgorithm):
    """Adjoint matching; see the module's docstring."""

    paper = "Adjoint Matching: Fine-tuning with Memoryless SOC, Domingo-Enrich et al. 2024, arXiv 2409.08861"
    Config = AdjointMatchingConfig
    needs_gradient = True
    noise: ClassVar[Mapping[str, float]] = {"ddim": 1.0, "flow_sde": math.sqrt(2)}
    metrics = {
        **TransitionAlgorithm.metrics,
        "kl": "KL of the steps to the base model, mean over dimensions.",
        "adjoint": "Length of the lean adjoint after the trained steps.",
    }

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse noise that is not memoryless."""
        super().check(sampler, reward, plan)
        wanted = self.noise.get(sampler.dynamics)
        if wanted is None or not math.isclose(sampler.eta, wanted, rel_tol=1e-3) or sampler.window is not None:
            raise UserError(
                f"algorithm {self.name!r} needs memoryless noise at every step, got dynamics={sampler.dynamics}, "
                f"eta={sampler.eta:g}, window={sampler.window}; leave sampler.dynamics, eta and window out, or set "
                "ddim with eta: 1 (noise prediction) or flow_sde with eta: 1.4142136 (flow), and window: null"
            )

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return nothing: the gradient of the reward is what is trained on."""
        return Prepared({})

    def needs_reference(self) -> bool:
        """Return True: the steps are measured from the base model's."""
        return True

    def adjoints(self, batch: Batch, context: Context) -> list[Tensor]:
        """Return the lean adjoint after each step, ``T`` tensors ``(B, *latent)``."""
        trajectory = batch.trajectory
        assert trajectory is not None
        adjoint = -self.config.reward_scale * _reward_gradient(trajectory, batch, context)
        found = [adjoint]
        with context.policy.reference():
            for index in range(trajectory.num_steps - 1, 0, -1):
                adjoint = context.sampler.pull_back(trajectory, index, adjoint)
                found.append(adjoint)
        return found[::-1]

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Carry the reward's gradient back, then regress each step on it."""
        adjoints = self.adjoints(batch, context)

        def loss_of(view: StepView, reference: Gaussian | None) -> tuple[Tensor, dict[str, Tensor]]:
            assert reference is not None
            adjoint = adjoints[view.index].to(view.mean)
            loss = matching_loss(view.mean, reference.mean, view.std, adjoint, view.gaussian.mask)
            return loss, {"kl": view.gaussian.kl(reference).detach(), "adjoint": adjoint.flatten(1).norm(dim=1)}

        return self.train_steps(batch, context, loss_of)


def _reward_gradient(trajectory: Trajectory, batch: Batch, context: Context) -> Tensor:
    """Return ``(B, *latent)`` the gradient of each sample's reward by its finished latents."""
    with torch.enable_grad():
        latents = working(trajectory.states[:, -1]).to(context.policy.device).detach().requires_grad_()
        images = context.sampler.decode(latents, batch.prompts, batch.keys, trajectory.conditions)
        total: Any = context.reward(images, batch.prompts, batch.metadata).total
    if not total.requires_grad:
        # Constant in the pixels of these samples: a reward that should have a gradient and has none is refused.
        return torch.zeros_like(latents)
    return torch.autograd.grad(total.sum(), latents)[0]
