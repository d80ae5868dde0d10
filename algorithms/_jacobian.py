"""Vectors carried back through one step of a recorded trajectory, by the pipeline's own call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difftune.denoiser import Action
from difftune.puppet import Prediction
from difftune.sampler import Sampler, _LoopLeft
from difftune.transition import working
from difftune.types import Trajectory


class _PullBack:
    """A driver that runs one step on a leaf and multiplies a vector by the Jacobian of its mean."""

    def __init__(self, trajectory: Trajectory, index: int, vector: Tensor) -> None:
        self._trajectory = trajectory
        self._index = index
        self._vector = vector
        self.result: Tensor | None = None

    def timesteps(self, scheduler: Any) -> None:
        pass

    def action(self, index: int) -> Action:
        return "grad" if index == self._index else "skip"

    def step(self, prediction: Prediction) -> Tensor:
        if prediction.index == self._index:
            mean = prediction.transition().mean
            (slope,) = torch.autograd.grad(mean, prediction.sample, self._vector.to(mean))
            self.result = working(slope.detach())
            torch.set_grad_enabled(False)
            raise _LoopLeft
        following = self._trajectory.states[:, prediction.index + 1].to(prediction.sample)
        if prediction.index + 1 < self._index:
            return following
        # From here to the step itself the pipeline's own lines (scaling, doubling for guidance) belong to the graph.
        torch.set_grad_enabled(True)
        return following.detach().clone().requires_grad_()


def pull_back(sampler: Sampler, trajectory: Trajectory, index: int, vector: Tensor) -> Tensor:
    """Return ``vector`` ``(B, *latent)`` times the Jacobian of step ``index``'s mean by the sample it received.

    Costs one denoiser call with its backward pass. ``index`` is at least 1: what step 0 receives is the pipeline's own.
    """
    driver = _PullBack(trajectory, index, vector)
    sampler._drive(driver, trajectory.prompts, trajectory.keys, trajectory.conditions)
    assert driver.result is not None, "the loop ended before the step"
    return driver.result
