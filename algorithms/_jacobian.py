"""Vectors carried back through one step of a recorded trajectory, by the pipeline's own call."""

from __future__ import annotations

from torch import Tensor

from difftune.sampler import Sampler
from difftune.types import Trajectory


def pull_back(sampler: Sampler, trajectory: Trajectory, index: int, vector: Tensor) -> Tensor:
    """Return ``vector`` ``(B, *latent)`` times the Jacobian of step ``index``'s mean: :meth:`Sampler.pull_back`."""
    return sampler.pull_back(trajectory, index, vector)
