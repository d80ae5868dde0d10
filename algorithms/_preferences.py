"""What the methods that learn from preferences share: pairs of samples, files of labelled pictures, beta's unit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field
from torch import Tensor

from difftune.advantage import Pairs, pairs_of, preference_units
from difftune.algorithm import Algorithm, AlgorithmConfig, Batch, Point, Prepared
from difftune.preferences import load_preferences
from difftune.prompts import Prompt
from difftune.types import RewardOutput

#: Beta in the unit of mean squared errors, by what the model predicts: Diffusion-DPO's, and that of flow_grpo's DPO.
BETA = {"noise": 5000.0, "velocity": 100.0}


class DataConfig(AlgorithmConfig):
    """Where preferences come from."""

    data: str | None = Field(
        None,
        description="A file of labelled pictures (.jsonl, .csv, .parquet) to train on in place of rollouts; null: "
        "samples of the current model, compared by the reward.",
    )


class PairsConfig(DataConfig):
    """Which samples are compared."""

    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="Compare a prompt's best sample with its worst, or all of its samples."
    )
    margin: float = Field(0.0, ge=0, description="Rewards that differ by no more than this make no pair.")


class Offline(Algorithm):
    """An algorithm that can learn from labelled pictures, which another model may have drawn."""

    @cached_property
    def _examples(self) -> list[Prompt] | None:
        return None if self.config.data is None else load_preferences(self.config.data)

    def examples(self) -> Sequence[Prompt] | None:
        """Return the pictures of ``data``."""
        return self._examples


class Paired(Offline):
    """An algorithm that compares samples of a prompt two by two."""

    compares = "compares"

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Return the samples that are compared; prompts of equal rewards are left out."""
        units = preference_units(rewards.total, prompts, self.config.pairs, self.config.margin)
        return Prepared({"reward": rewards.total}, units)

    def pairs(self, batch: Batch) -> Pairs:
        """Return the pairs of a micro-batch."""
        return pairs_of(batch.values["reward"], batch.units, self.config.margin)


def beta_of(beta: float | None, point: Point) -> float:
    """Return ``beta``, or the default of the point's kind of model."""
    return BETA[point.space] if beta is None else beta


def improvement(point: Point, reference: str = "reference") -> Tensor:
    """Return ``(B,)`` m_ref - m: how much better than the stored adapter the policy fits each sample's noise."""
    return point.error(reference) - point.error()
