r"""SePPO: semi-policy preference optimisation from winning pictures alone (Zhang et al. 2024, arXiv 2410.05255).

There are no losing pictures. An earlier checkpoint of the policy, drawn at random, is the reference, and its own
samples stand in for the losers. Whether such a *reference sample* is really worse is asked of the winner, the anchor:
with m the squared error of the noise and Delta = m_theta - m_ref,

.. math::  s = \operatorname{sign}\big(m^w_{\mathrm{ref}} - m^w_\theta\big), \qquad
           L = -\log\sigma\Big(-\frac{\beta}{2}\big[\Delta^w - s\,\Delta^r\big]\Big).

If the policy already fits the winner better than the reference does (s = 1), the reference's sample is taken for a
loser; if it does not (s = -1), for another winner. At theta = ref, s is 0: the loss is ln 2 and only the winner has a
gradient.

Which variant this is. The authors published their evaluation only: the loss is put together from descriptions of the
paper, in the form of Diffusion-DPO, whose beta and shared noise it takes. s is one number per pair and noise level, and
carries no gradient. The checkpoints are those of the trained weights, the base model first, a new one every
``checkpoint_every`` updates (the paper: 30, about 7 in all); one is drawn for each epoch. Winners come from a file
(``data``, one picture a line, or the better of a pair), and the reference draws its samples in the epoch: set
``train.samples_per_prompt`` to 2. Without a file, the reference draws all samples, and the reward's best of a prompt is
the winner: an adaptation of ours. On flow models, where the paper has none, m is the velocity's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difftune.advantage import exceeds, groups_of
from difftune.algorithm import BareConfig, Batch, Point, Prepared, SampleAlgorithm, algorithm
from difftune.algorithms._preferences import DataConfig, Offline, beta_of, improvement
from difftune.noise import keyed_generator
from difftune.policy import Policy
from difftune.prompts import Prompt
from difftune.types import RewardOutput, SampleKey


class SePPOConfig(DataConfig, BareConfig):
    """SePPO's settings."""

    lr: float = Field(2e-5, gt=0, description="Learning rate of AdamW (our default, as for Diffusion-DPO).")
    beta: float | None = Field(
        None, gt=0, description="Strength of the preference in mean squared errors; null: as for Diffusion-DPO."
    )
    anchor: Literal["sign", "indicator", "off"] = Field(
        "sign", description="s: the sign (paper), 1 or 0, or always 1 (the paper's ablations)."
    )
    reference: Literal["uniform", "first", "latest"] = Field(
        "uniform", description="Which checkpoint is the reference: any (paper), the base model, or the latest."
    )
    checkpoint_every: int = Field(30, ge=1, description="Updates between checkpoints of the weights (paper: 30).")
    checkpoints: int = Field(8, ge=1, description="Checkpoints kept beside the base model, the newest ones.")


def anchor_sign(winner_gain: Tensor, form: str) -> Tensor:
    """Return s ``(P,)`` of the winners' gains m_ref - m_theta ``(P,)``, without gradient; see the settings' forms."""
    gain = winner_gain.detach()
    if form == "off":
        return torch.ones_like(gain)
    return gain.sign() if form == "sign" else (gain > 0).to(gain)


def semi_policy_loss(winner_gain: Tensor, sample_gain: Tensor, s: Tensor, beta: float) -> Tensor:
    """Return ``(P,)`` -log sigmoid((beta / 2) (gain_w - s gain_r)) of gains m_ref - m_theta = -Delta."""
    return -F.logsigmoid(0.5 * beta * (winner_gain - s * sample_gain))


@algorithm("seppo")
class SePPO(Offline, SampleAlgorithm):
    """SePPO; see the module's docstring."""

    paper = "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment, Zhang et al. 2024, arXiv 2410.05255"
    Config = SePPOConfig
    compares = "tells winners from reference samples"
    draws_rest = True
    shared_noise = True
    behaviour = "anchor"
    metrics = {
        **SampleAlgorithm.metrics,
        "anchor": "Mean of s: 1, every reference sample is a loser; -1, every one is another winner.",
        "winner_gain": "How much better than the reference the policy fits the winners' noise (m_ref - m).",
        "sample_gain": "The same of the reference's own samples.",
    }

    def examples(self) -> Sequence[Prompt] | None:
        """Return the winning picture of each record of ``data``; ties and losers are left out."""
        found = super().examples()
        return None if found is None else [winner for record in found for winner in _winner(record)]

    def setup(self, policy: Policy) -> None:
        """Begin with the current weights as the only checkpoint."""
        policy.store_adapter("checkpoint0")
        policy.store_adapter("anchor")

    def adapters(self) -> tuple[str, ...]:
        """Return the epoch's reference."""
        return ("anchor",)

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return pairs of a prompt's best sample and its first other one; prompts of equal rewards are left out."""
        units = []
        for group in groups_of(prompts):
            best = group[int(rewards.total[group].argmax())]
            others = [i for i in group if exceeds(rewards.total[best], rewards.total[i])]
            units += [[best, others[0]]] if others else []
        return Prepared({}, units)

    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses ``(P,)`` of the pairs."""
        gain = improvement(point, "anchor")
        winner, sample = gain[[pair[0] for pair in batch.units]], gain[[pair[1] for pair in batch.units]]
        s = anchor_sign(winner, self.config.anchor)
        loss = semi_policy_loss(winner, sample, s, beta_of(self.config.beta, point))
        return loss, {"anchor": s, "winner_gain": winner.detach(), "sample_gain": sample.detach()}

    def after_step(self, policy: Policy, step: int) -> None:
        """Keep a checkpoint when one is due."""
        number, rest = divmod(step, self.config.checkpoint_every)
        if rest == 0:
            policy.store_adapter(f"checkpoint{(number - 1) % self.config.checkpoints + 1}")

    def after_epoch(self, policy: Policy, step: int) -> None:
        """Draw the next epoch's reference."""
        newest = step // self.config.checkpoint_every
        kept = range(max(newest - self.config.checkpoints, 0) + 1, newest + 1)
        slots = ["checkpoint0", *(f"checkpoint{(number - 1) % self.config.checkpoints + 1}" for number in kept)]
        if self.config.reference == "uniform":
            generator = keyed_generator(SampleKey(0, step, "", 0), "seppo")
            chosen = slots[int(torch.randint(len(slots), (1,), generator=generator))]
        else:
            chosen = slots[0] if self.config.reference == "first" else slots[-1]
        with policy.adapter(chosen):
            policy.store_adapter("anchor")


def _winner(record: Prompt) -> list[Prompt]:
    """Return the record with its best picture alone, or nothing where there is no best one."""
    images, labels = record.metadata["images"], record.metadata["labels"]
    best = max(labels)
    # A single picture is a winner if its label says so.
    if best <= 0 or (len(labels) > 1 and labels.count(best) > 1):
        return []
    chosen = images[labels.index(best)]
    return [Prompt(record.text, {**record.metadata, "images": (chosen,), "labels": (1.0,)})]
