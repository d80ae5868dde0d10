r"""D3PO: direct preference for denoising diffusion policy optimisation (Yang et al. 2023, arXiv 2311.13231).

Every denoising step is a decision; a preference between two finished samples is taken as a preference between their
decisions at each step. With the ratios to the *base* model rho = p_theta(x' | x) / p_ref(x' | x),

.. math::  L_t = -\log \sigma\big(\beta \log \mathrm{clamp}(\rho_t^w, 1 \pm \epsilon)
                 - \beta \log \mathrm{clamp}(\rho_t^l, 1 \pm \epsilon)\big).

At theta = ref the loss is ln 2. The other steps act as label noise on each step's preference: the direction is right,
the optimum is not that of DPO on whole trajectories. Beyond the clamp there is no gradient, and no way back.

Which variant this is. Preferences come from the reward, within a prompt (best against worst, or all pairs); ties make
no pair (in the authors' code a tie adds a constant log 2). Ratios are of mean log-probs per dimension (their d-th
root), as in ddpo-pytorch's descendants; ``reduce: sum`` is the density itself. In the authors' code both samples of a
pair begin from the same initial noise: ``sampler.initial_noise: prompt`` (each has its own by default). With ``data``
the pictures of a file are compared; their denoising steps, which nobody saw, are drawn given the picture: the sampler's
own steps with the true clean sample in place of a prediction, as Diffusion-DPO's derivation has it (not in the D3PO
paper). On flow models the same loss runs on the SDE's Gaussians.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difftune.advantage import Pairs
from difftune.algorithm import Batch, Context, TransitionAlgorithm, TransitionConfig, algorithm
from difftune.algorithms._preferences import Paired, PairsConfig
from difftune.sampler import StepView
from difftune.transition import Gaussian


class D3POConfig(PairsConfig, TransitionConfig):
    """D3PO's settings; defaults are those of the authors' code unless said otherwise."""

    lr: float = Field(3e-5, gt=0, description="Learning rate of AdamW (the authors', LoRA).")
    beta: float = Field(0.1, gt=0, description="Strength of the preference, in the unit of ``reduce``.")
    clip_range: float = Field(0.1, gt=0, description="Ratios to the base model are clamped to 1 plus or minus this.")
    reduce: Literal["mean", "sum"] = Field(
        "mean", description="Log-probs averaged over dimensions (popular code) or summed (the density)."
    )


def preference_logit(winner: Tensor, loser: Tensor, beta: float, clip_range: float) -> Tensor:
    """Return beta (log clamp(rho_w) - log clamp(rho_l)) of log-ratios ``(P,)`` to the base model."""
    # Clamped as logarithms, the same value: the ratio of a step with little noise may be too large for a float.
    low = math.log(1 - clip_range) if clip_range < 1 else -math.inf
    high = math.log(1 + clip_range)
    return beta * (winner.clamp(low, high) - loser.clamp(low, high))


def preference_loss(winner: Tensor, loser: Tensor, beta: float, clip_range: float) -> Tensor:
    """Return -log sigmoid of :func:`preference_logit`, ``(P,)``."""
    return -F.logsigmoid(preference_logit(winner, loser, beta, clip_range))


@algorithm("d3po")
class D3PO(Paired, TransitionAlgorithm):
    """D3PO; see the module's docstring."""

    paper = "Using Human Feedback to Fine-tune Diffusion without Any Reward Model, Yang et al. 2023, arXiv 2311.13231"
    Config = D3POConfig
    metrics = {
        **TransitionAlgorithm.metrics,
        "implicit_accuracy": "Share of pairs whose winner gained more log-prob on the base model than the loser.",
        "clip_fraction": "Share of samples and steps whose ratio to the base model is outside the clamp: no gradient.",
        "margin": "Log-ratio of the winner less that of the loser, in the unit of `reduce`.",
    }

    def needs_reference(self) -> bool:
        """Return True: the ratios are to the base model."""
        return True

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Replay the chosen steps and compare within pairs."""
        pairs = self.pairs(batch)
        trajectory = batch.trajectory
        assert trajectory is not None

        def loss_of(view: StepView, reference: Gaussian | None) -> tuple[Tensor, dict[str, Tensor]]:
            assert reference is not None
            base = reference.log_prob(trajectory.step_out(view.index).to(view.mean.device))
            log_ratio = view.log_prob - base
            return self.pair_loss(log_ratio * (view.dims if self.config.reduce == "sum" else 1), pairs)

        return self.train_steps(batch, context, loss_of)

    def pair_loss(self, log_ratio: Tensor, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(P,)`` of a step's log-ratios ``(B,)``, and how often the winner's is the larger."""
        winner, loser = log_ratio[pairs.winners], log_ratio[pairs.losers]
        loss = preference_loss(winner, loser, self.config.beta, self.config.clip_range)
        off = log_ratio.detach().exp() - 1
        stats = {
            "implicit_accuracy": (winner > loser).float(),
            "clip_fraction": (off.abs() > self.config.clip_range).float(),
            "margin": (winner - loser).detach(),
        }
        return loss * pairs.weights.to(loss), stats
