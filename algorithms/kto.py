r"""Diffusion-KTO: utility maximisation without pairs (Li et al. 2024, arXiv 2404.04465).

A sample is desirable or not by itself. With g how much better the policy fits the sample's noise than the base model
does, less a baseline z for all samples, the model's utility is a sigmoid of g for desirable and of -g for undesirable
samples:

.. math::  g = -(m_\theta - m_{\mathrm{ref}}) - z, \qquad
           z = \max\big(0, \overline{-(m_\theta - m_{\mathrm{ref}})}\big), \qquad
           L = w\,\big(1 - \sigma(\pm\beta g)\big).

At theta = ref the loss is w / 2, and its gradient by g is -+ w beta / 4.

Which variant this is. m are mean squared errors (of the velocity on flow models). z is the mean over the samples of the
prompt, held constant; in the authors' code it is the batch's. Labels come from the reward: desirable above the mean of
its prompt's samples, undesirable below. The value of the authors' beta was not found; the default is Diffusion-DPO's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from difftune.advantage import groups_of, normalize_groups
from difftune.algorithm import (
    Batch,
    Plan,
    Point,
    Prepared,
    SampleAlgorithm,
    SampleConfig,
    algorithm,
    require_group,
)
from difftune.reward import Reward
from difftune.sampler import Sampler
from difftune.types import RewardOutput

#: Beta in the unit of mean errors, by what the model predicts: those of Diffusion-DPO and of flow_grpo's DPO.
BETA = {"noise": 5000.0, "velocity": 100.0}


class KTOConfig(SampleConfig):
    """Diffusion-KTO's settings."""

    lr: float = Field(2e-5, gt=0, description="Learning rate of AdamW (our default; the authors' 1e-7 is a UNet's).")
    beta: float | None = Field(
        None, gt=0, description="Slope of the utility in mean squared errors; null: 5000 on noise, 100 on velocity."
    )
    desirable_weight: float = Field(1.0, gt=0, description="w of desirable samples (the authors': 1).")
    undesirable_weight: float = Field(1.0, gt=0, description="w of undesirable samples (the authors': 1).")


def utility_loss(gain: Tensor, label: Tensor, baseline: Tensor, beta: float) -> Tensor:
    """Return ``(B,)`` 1 - sigmoid(label beta (gain - baseline)); labels are +1 (desirable) and -1, gains m_ref - m."""
    return 1 - torch.sigmoid(label * beta * (gain - baseline.detach()))


def unit_means(values: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """Return ``(B,)`` the mean of each value's unit."""
    out = torch.zeros_like(values)
    for unit in units:
        out[list(unit)] = values[list(unit)].mean()
    return out


@algorithm("kto")
class KTO(SampleAlgorithm):
    """Diffusion-KTO; see the module's docstring."""

    paper = "Aligning Diffusion Models by Optimizing Human Utility, Li et al. 2024, arXiv 2404.04465"
    Config = KTOConfig

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse runs without anything to compare a sample with."""
        super().check(sampler, reward, plan)
        require_group(self.name, plan, "labels samples")

    def adapters(self) -> tuple[str, ...]:
        """Return the base model."""
        return ("reference",)

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``label`` ``(B,)``, +1 or -1 (0 at the mean); prompts of equal rewards are left out."""
        label = normalize_groups(rewards.total, prompts).sign()
        return Prepared({"label": label}, [g for g in groups_of(prompts) if bool(label[g].any())])

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(B,)``; samples without a label have none."""
        config = self.config
        beta = BETA[point.space] if config.beta is None else config.beta
        gain = point.error("reference") - point.error()
        label = batch.values["label"].to(gain)
        baseline = unit_means(gain.detach(), batch.units).clamp(min=0)
        weight = torch.where(label > 0, config.desirable_weight, config.undesirable_weight) * label.abs()
        loss = weight * utility_loss(gain, label, baseline, beta)
        return loss, {"gain": gain.detach(), "baseline": baseline, "implicit_accuracy": (gain * label > 0).float()}
