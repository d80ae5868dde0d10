r"""Diffusion-DPO and Flow-DPO: preferences on the forward process (Wallace et al. 2023; Liu et al. 2025).

Winner and loser are noised with the *same* noise to the *same* level; the model must improve on the base model more for
the winner than for the loser. With m the squared error of the noise (on flow models of the velocity, Flow-DPO),

.. math::  L = -\log \sigma\Big(-\frac{\beta}{2}\big[(m^w_\theta - m^w_{\mathrm{ref}})
               - (m^l_\theta - m^l_{\mathrm{ref}})\big]\Big).

At theta = ref the loss is ln 2, and exchanging winner and loser gives 1 - e^{-L} for e^{-L}.

Which variant this is, and how popular code differs. Errors are *means* over dimensions (a beta for sums is beta / d),
as in the authors' code, whose beta of 5000 holds the paper's constants. Flow-DPO's own beta of 500 is for sums;
flow_grpo's images use 100 for means. ``schedule: derived`` is the paper's beta (1 - t)^2 on flow models, the same as
errors of the noise with a constant beta: the authors (VideoAlign) warn that it hacks the reward, and use the constant.
The loss can fall by a larger error on the loser, too: watch ``winner_error``. Pairs come from the reward, within a
prompt, on samples of the current model (flow_grpo's online form), or from a file (``data``), as in the papers.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difftune.algorithm import BareConfig, Batch, Point, SampleAlgorithm, algorithm
from difftune.algorithms._preferences import Paired, PairsConfig, beta_of


class DiffusionDPOConfig(PairsConfig, BareConfig):
    """Settings of Diffusion-DPO and Flow-DPO."""

    lr: float = Field(2e-5, gt=0, description="Learning rate of AdamW (Diffusion-DPO's 1e-8 times its batch of 2048).")
    beta: float | None = Field(
        None,
        gt=0,
        description="Strength of the preference in mean squared errors; null: 5000 on noise (the authors), 100 on "
        "velocity (flow_grpo).",
    )
    schedule: Literal["constant", "derived"] = Field(
        "constant",
        description="beta as it is, or beta (1 - t)^2 on flow models: derived in the paper, which warns of hacking.",
    )


def preference_logit(winner: Tensor, loser: Tensor, beta: float) -> Tensor:
    """Return -(beta / 2) (Delta_w - Delta_l), ``(P,)``, of errors less the base model's."""
    return -0.5 * beta * (winner - loser)


def preference_loss(winner: Tensor, loser: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid of :func:`preference_logit`, ``(P,)``."""
    return -F.logsigmoid(preference_logit(winner, loser, beta))


@algorithm("diffusion_dpo")
class DiffusionDPO(Paired, SampleAlgorithm):
    """Diffusion-DPO and Flow-DPO; see the module's docstring."""

    paper = "Diffusion Model Alignment Using Direct Preference Optimization, Wallace et al. 2023, arXiv 2311.12908"
    Config = DiffusionDPOConfig
    metrics = {
        **SampleAlgorithm.metrics,
        "implicit_accuracy": "Share of pairs in which the policy improved on the base model more for the winner.",
        "winner_error": "Squared error on the winners, mean over dimensions; rising: the loss falls on losers alone.",
        "loser_error": "Squared error on the losers, mean over dimensions.",
    }
    shared_noise = True

    def adapters(self) -> tuple[str, ...]:
        """Return the base model."""
        return ("reference",)

    def beta_at(self, point: Point) -> float:
        """Return beta at a noise level: constant, or times (1 - t)^2 on flow models."""
        beta = beta_of(self.config.beta, point)
        derived = self.config.schedule == "derived" and point.space == "velocity"
        return beta * (1 - point.level.sigma) ** 2 if derived else beta

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(P,)`` of the pairs."""
        pairs = self.pairs(batch)
        error = point.error()
        delta = error - point.error("reference")
        winner, loser = delta[pairs.winners], delta[pairs.losers]
        loss = preference_loss(winner, loser, self.beta_at(point))
        stats = {
            "implicit_accuracy": (winner < loser).float(),
            "winner_error": error[pairs.winners].detach(),
            "loser_error": error[pairs.losers].detach(),
        }
        return loss * pairs.weights.to(loss), stats
