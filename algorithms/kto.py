r"""Diffusion-KTO: utility maximisation without pairs (Li et al. 2024, arXiv 2404.04465).

A sample is desirable or not by itself. With g how much better the policy fits the sample's noise than the base model
does, less a baseline z for all samples, the model's utility is a sigmoid of g for desirable and of -g for undesirable
samples:

.. math::  g = -(m_\theta - m_{\mathrm{ref}}) - z, \qquad
           z = \max\big(0, \overline{-(m_\theta - m_{\mathrm{ref}})}\big), \qquad
           L = w\,\big(1 - \sigma(\pm\beta g)\big).

At theta = ref the loss is w / 2, and its gradient by g is -+ w beta / 4.

Which variant this is. m are mean squared errors (of the velocity on flow models, carried over). Labels come from the
reward: desirable above the mean of its prompt's samples, undesirable below, and z is the mean over those samples, held
constant. With ``threshold`` a sample is judged by its reward alone, and z is the mean over ``baseline_samples`` of the
epoch (in the authors' code over the batch); that is the form for files of labelled pictures (``data``), which may have
one picture a line. The authors draw desirable pictures with probability 0.8; here samples come as they are, and the
weights say how much each side counts. The value of their beta was not found; the default is Diffusion-DPO's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from difftune.advantage import groups_of, signs_in_groups
from difftune.algorithm import BareConfig, Batch, Plan, Point, Prepared, SampleAlgorithm, algorithm, require_group
from difftune.algorithms._preferences import DataConfig, Offline, beta_of, improvement
from difftune.reward import Reward
from difftune.sampler import Sampler
from difftune.types import RewardOutput


class KTOConfig(DataConfig, BareConfig):
    """Diffusion-KTO's settings."""

    lr: float = Field(2e-5, gt=0, description="Learning rate of AdamW (our default; the authors' 1e-7 is a UNet's).")
    beta: float | None = Field(
        None, gt=0, description="Slope of the utility in mean squared errors; null: 5000 on noise, 100 on velocity."
    )
    desirable_weight: float = Field(1.0, gt=0, description="w of desirable samples (the authors': 1).")
    undesirable_weight: float = Field(1.0, gt=0, description="w of undesirable samples (the authors': 1).")
    threshold: float | None = Field(
        None, description="Samples are desirable above this reward or label; null: above the mean of their prompt."
    )
    baseline_samples: int = Field(
        8, ge=2, description="Samples whose mean gain is the baseline z, where a threshold is set (authors': a batch)."
    )


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
class KTO(Offline, SampleAlgorithm):
    """Diffusion-KTO; see the module's docstring."""

    paper = "Aligning Diffusion Models by Optimizing Human Utility, Li et al. 2024, arXiv 2404.04465"
    Config = KTOConfig
    metrics = {
        **SampleAlgorithm.metrics,
        "gain": "How much better than the base model the policy fits the samples' noise (m_ref - m).",
        "baseline": "z, the mean gain that g is measured from.",
        "implicit_accuracy": "Share of samples whose gain has the sign of their label.",
    }

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse runs without anything to compare a sample with."""
        super().check(sampler, reward, plan)
        if self.config.threshold is None:
            require_group(self.name, plan, "labels samples")

    def adapters(self) -> tuple[str, ...]:
        """Return the base model."""
        return ("reference",)

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return ``label`` ``(B,)``, +1 or -1 (0 at the mean or the threshold), and the samples that share a z."""
        if self.config.threshold is not None:
            label = (rewards.total.float() - self.config.threshold).sign()
            told = label.nonzero().flatten().tolist()
            size = self.config.baseline_samples
            return Prepared({"label": label}, [told[start : start + size] for start in range(0, len(told), size)])
        label = signs_in_groups(rewards.total, prompts)
        return Prepared({"label": label}, [g for g in groups_of(prompts) if bool(label[g].any())])

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(B,)``; samples without a label have none."""
        config = self.config
        beta, gain = beta_of(config.beta, point), improvement(point)
        label = batch.values["label"].to(gain)
        baseline = unit_means(gain.detach(), batch.units).clamp(min=0)
        weight = torch.where(label > 0, config.desirable_weight, config.undesirable_weight) * label.abs()
        loss = weight * utility_loss(gain, label, baseline, beta)
        return loss, {"gain": gain.detach(), "baseline": baseline, "implicit_accuracy": (gain * label > 0).float()}
