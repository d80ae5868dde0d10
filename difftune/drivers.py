"""The drivers: what decides, at each step of a pipeline's loop, what the pipeline gets back.

A driver answers two questions during one call of the pipeline: what the denoiser does at step k (``action``: run, run
with gradients, be skipped), and which sample the loop goes on with (``step``). Recording, replaying, probing,
backpropagating, decoding and pulling vectors back differ in nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftune.denoiser import Action
from difftune.puppet import Prediction, override_timesteps
from difftune.transition import Gaussian, Level, working
from difftune.types import ParityError, SampleKey, Trajectory, UserError

TakeStep = Callable[[Prediction], tuple[Tensor, Gaussian]]
"""Draws a step: x' ``(B, *latent)`` in the sample's dtype, and the Gaussian it was drawn from."""


class LoopLeft(Exception):
    """Raised by a driver to leave the pipeline's loop: nothing after this step is needed."""


@dataclass(frozen=True)
class StepView:
    """One replayed step, as handed to ``on_step``.

    Attributes:
        index: the step's number in the trajectory.
        timestep: the pipeline's own timestep.
        gaussian: the transition under the current weights, with its graph.
        log_prob: ``(B,)`` mean log-prob per dimension of the *stored* x', with its graph.
        old_log_prob: ``(B,)`` the same as recorded at the rollout.
        x0: ``(B, *latent)`` predicted clean sample, with its graph.
        dims: the number of dimensions d (sum log-prob = d * mean log-prob).
    """

    index: int
    timestep: float
    gaussian: Gaussian
    log_prob: Tensor
    old_log_prob: Tensor
    x0: Tensor
    dims: int

    @property
    def mean(self) -> Tensor:
        """``(B, *latent)`` mean of the step's Gaussian, with its graph."""
        return self.gaussian.mean

    @property
    def std(self) -> float:
        """Standard deviation of the step's Gaussian."""
        return self.gaussian.std


@dataclass(frozen=True)
class PointView:
    """The guided prediction at one point (x_t, t) of the forward process, as handed to ``on_point``.

    Attributes:
        index: the point's number in the list given to :meth:`Sampler.probe`.
        timestep: the point's timestep.
        level: its noise level.
        x_t: ``(B, *latent)`` the noisy sample.
        output: ``(B, *latent)`` the pipeline's guided model output, fp32, with its graph.
        x0: ``(B, *latent)`` the clean sample it predicts.
        noise: ``(B, *latent)`` the noise it predicts.
    """

    index: int
    timestep: float
    level: Level
    x_t: Tensor
    output: Tensor
    x0: Tensor
    noise: Tensor


class Driver:
    """Common ground of the drivers: native timesteps, denoiser run without gradients; subclasses give ``step``.

    Attributes:
        outlived: whether the denoiser's graphs are used after their step.
    """

    outlived = False

    def timesteps(self, scheduler: Any) -> None:
        """Keep the pipeline's own timesteps."""

    def action(self, index: int) -> Action:
        """Run the denoiser without gradients."""
        return "run"

    def restart(self) -> bool:
        """Get ready to be driven once more from the beginning; False if results have been handed out already."""
        return True


class StepCounter(Driver):
    """Runs the loop without the denoiser and counts its steps.

    Attributes:
        length: the number of steps so far.
    """

    def __init__(self) -> None:
        self.length = 0

    def action(self, index: int) -> Action:
        """Skip the denoiser."""
        return "skip"

    def restart(self) -> bool:
        """Begin again."""
        self.length = 0
        return True

    def step(self, prediction: Prediction) -> Tensor:
        """Count the step, and return the sample as it is."""
        self.length += 1
        return prediction.sample


class Recorder(Driver):
    """Draws each step's noise and stores what the step received and returned.

    Args:
        take_step: draws a step.
        leave_after: leave the loop after so many steps; ``None`` runs the call to its end.
    """

    def __init__(self, take_step: TakeStep, leave_after: int | None) -> None:
        self._take_step = take_step
        self._leave_after = leave_after
        self._samples: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self._stochastic: list[bool] = []
        self._times: list[float] = []
        # Of the last step, and of those whose outcome the pipeline changed before it went on.
        self._gaussians: dict[int, Gaussian] = {}
        self.outs: list[Tensor] = []

    def step(self, prediction: Prediction) -> Tensor:
        """Draw the step and take down its log-prob."""
        following, gaussian = self._take_step(prediction)
        sample, number = prediction.sample, len(self.outs)
        noisy = gaussian.std > 0
        if self.outs and torch.equal(sample, self.outs[-1]):
            self._gaussians.pop(number - 1, None)
        if noisy:
            self._gaussians[number] = gaussian
        # A copy: some pipelines write the step's outcome over the sample.
        self._samples.append(sample.clone())
        self.outs.append(following)
        # The log-prob of the *rounded* sample: that is the one the replay will see.
        log_prob = gaussian.log_prob(following) if noisy else sample.new_zeros(len(sample), dtype=torch.float32)
        self._log_probs.append(log_prob)
        self._stochastic.append(noisy)
        self._times.append(prediction.timestep)
        if len(self.outs) == self._leave_after:
            raise LoopLeft
        return following

    @property
    def length(self) -> int:
        """The number of steps recorded so far."""
        return len(self.outs)

    @property
    def followed(self) -> bool:
        """Whether each step received what the one before it returned."""
        return all(torch.equal(a, b) for a, b in zip(self._samples[1:], self.outs[:-1], strict=True))

    def trajectory(
        self,
        prompts: tuple[str, ...],
        keys: tuple[SampleKey, ...],
        conditions: Mapping[str, Any],
        kept: Sequence[Tensor] | None = None,
    ) -> Trajectory:
        """Return what was recorded.

        Args:
            prompts, keys, conditions: what the call was made with.
            kept: per step, which of its dimensions the pipeline goes on with (:class:`BlendTracer`); the others are
                left out of its log-prob.
        """
        if not self.outs:
            raise UserError("the pipeline never called scheduler.step: it has no denoising loop to record")
        shapes = {tuple(sample.shape) for sample in (*self._samples, *self.outs)}
        if len(shapes) > 1:
            raise UserError(
                f"the pipeline's latents change their shape between steps ({sorted(shapes)}); difftune trains loops of "
                "one shape"
            )
        if kept is not None:
            for number, gaussian in self._gaussians.items():
                masked = dataclasses.replace(gaussian, mask=kept[number])
                self._log_probs[number] = masked.log_prob(self.outs[number])
        return Trajectory(
            states=torch.stack([*self._samples, self.outs[-1]], dim=1),
            times=torch.tensor(self._times),
            log_probs=torch.stack(self._log_probs, dim=1),
            stochastic=torch.tensor(self._stochastic),
            prompts=prompts,
            keys=keys,
            steps_out=None if self.followed else torch.stack(self.outs, dim=1),
            kept=None if kept is None else torch.stack(list(kept), dim=1),
            conditions=dict(conditions),
        )


class Retracer(Recorder):
    """Records steps that could have led to clean samples ``(B, *latent)``: every prediction is the truth.

    The denoiser is not run. With DDPM's noise these are the exact posterior steps q(x_{t-1} | x_t, x_0).
    """

    def __init__(self, take_step: TakeStep, x0: Tensor, steps: int) -> None:
        super().__init__(take_step, steps)
        self._x0 = working(x0)

    def action(self, index: int) -> Action:
        """Skip the denoiser."""
        return "skip"

    def step(self, prediction: Prediction) -> Tensor:
        """Draw the step as if the model had predicted the clean sample exactly."""
        x0 = self._x0.to(prediction.sample.device)
        noise = (working(prediction.sample) - prediction.now.alpha * x0) / prediction.now.sigma
        # A flow model's output is its velocity; elsewhere the step is taken from x0 and the noise.
        return super().step(dataclasses.replace(prediction, x0=x0, noise=noise, output=noise - x0))


class BlendTracer(Driver):
    """Finds which dimensions of each step's x' the pipeline goes on with, and which it overwrites (inpainting).

    The recorded loop runs once more without the denoiser. What a step returned is given to the pipeline with a graph,
    and a dimension on which nothing depends that the next step receives has been overwritten: it is drawn, scored by
    nobody and thrown away, and would only add noise to the log-prob. Values would not tell: a pipeline that rescales
    its latents changes every dimension and overwrites none.

    Args:
        outs: what each recorded step returned, ``(B, *latent)``.
    """

    def __init__(self, outs: Sequence[Tensor]) -> None:
        self._outs = outs
        self._leaf: Tensor | None = None
        self._kept: list[Tensor] = []

    def action(self, index: int) -> Action:
        """Skip the denoiser."""
        return "skip"

    def restart(self) -> bool:
        """Begin again."""
        self._leaf, self._kept = None, []
        return True

    def step(self, prediction: Prediction) -> Tensor:
        """Look at what came of the step before, and go on with the recorded x'."""
        if self._leaf is not None:
            self._kept.append(_reaches(self._leaf, prediction.sample))
        if prediction.index + 1 == len(self._outs):
            raise LoopLeft
        torch.set_grad_enabled(True)
        self._leaf = self._outs[prediction.index].detach().clone().requires_grad_()
        # Not the leaf itself, which the pipeline could not change in place.
        return self._leaf.view_as(self._leaf)

    @property
    def kept(self) -> list[Tensor] | None:
        """Per step, ``(B, *latent)`` bool: the dimensions that are kept; ``None`` if no step loses any.

        What is decoded does not come back to the scheduler: of the last step the same is kept as of the one before.
        """
        if not self._kept or all(bool(kept.all()) for kept in self._kept):
            return None
        return [*self._kept, self._kept[-1]]


def _reaches(leaf: Tensor, sample: Tensor) -> Tensor:
    """Return ``(B, *latent)`` bool, the dimensions of ``leaf`` that ``sample`` depends on."""
    if not sample.requires_grad:
        # The pipeline cut the graph: what has kept its value was kept.
        return sample == leaf
    # A weighted sum, so that dependences do not cancel.
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(sample.shape, generator=generator).to(sample) + 0.5
    (slope,) = torch.autograd.grad((sample * weight).sum(), leaf)
    return slope != 0


class Replayer(Driver):
    """Returns the stored samples; at the wanted steps hands the transition to the callback."""

    def __init__(
        self, trajectory: Trajectory, on_step: Callable[[StepView], Any], wanted: Sequence[int], grad: bool
    ) -> None:
        self._trajectory = trajectory
        self._on_step = on_step
        self._wanted = frozenset(wanted)
        self._last = max(wanted)
        self._grad = grad
        self._handed_out = False

    def action(self, index: int) -> Action:
        """Run the wanted steps."""
        if index not in self._wanted:
            return "skip"
        return "grad" if self._grad else "run"

    def restart(self) -> bool:
        """Begin again, unless a step has been handed out."""
        return not self._handed_out

    def step(self, prediction: Prediction) -> Tensor:
        """Return the recorded x', and hand out the transition if it is wanted."""
        index = prediction.index
        trajectory = self._trajectory
        following = trajectory.step_out(index).to(prediction.sample.device)
        if index in self._wanted:
            stored = trajectory.states[:, index].to(prediction.sample.device)
            if not _same_sample(prediction.sample, stored):
                raise ParityError(
                    f"parity: at step {index} the pipeline holds another sample than the one recorded; it draws "
                    "noise of its own, or the trajectory was stored in another dtype"
                )
            kept = None if trajectory.kept is None else trajectory.kept[:, index].to(following.device)
            gaussian = dataclasses.replace(prediction.transition(), mask=kept)
            self._handed_out = True
            self._on_step(
                StepView(
                    index=index,
                    timestep=prediction.timestep,
                    gaussian=gaussian,
                    log_prob=gaussian.log_prob(following),
                    old_log_prob=trajectory.log_probs[:, index].to(following.device),
                    x0=prediction.x0,
                    dims=trajectory.dims,
                )
            )
            torch.set_grad_enabled(False)
        if index >= self._last:
            raise LoopLeft
        return following


class Prober(Driver):
    """Dictates (t, x_t): a first step that is not evaluated leads to the first point, each point to the next."""

    def __init__(
        self, points: Sequence[tuple[float, Tensor]], on_point: Callable[[PointView], Any], grad: bool, offset: int
    ) -> None:
        self._points = points
        self._offset = offset
        self._on_point = on_point
        self._grad = grad
        self._padding = 1
        self._next: int | None = None
        self.visited = 0

    def timesteps(self, scheduler: Any) -> None:
        """Put the points' timesteps at the end of the pipeline's own."""
        times = [t for t, _ in self._points]
        # Points come last: image-to-image pipelines begin in the middle of the list. At least one step precedes them.
        have = len(scheduler.timesteps) - scheduler._difftune.grid.terminal
        self._padding = max(have - len(times), 1)
        # All different from one another and from the points, so that where a loop begins can be told by its timestep.
        native = [t for t in scheduler.timesteps[:have].tolist() if t not in times] or times
        override_timesteps(scheduler, native[: self._padding] + times)

    def action(self, index: int) -> Action:
        """Skip the steps before the first point."""
        if self._next is None or self._next < 0:
            return "skip"
        return "grad" if self._grad else "run"

    def restart(self) -> bool:
        """Begin again, unless a point has been handed out."""
        self._next = None
        return not self.visited

    def step(self, prediction: Prediction) -> Tensor:
        """Hand out the point that the pipeline has come to, and lead it to the next."""
        point = prediction.position - self._padding
        if self._next is not None and point >= 0:
            self.visited += 1
            self._on_point(
                PointView(
                    index=self._offset + point,
                    timestep=prediction.timestep,
                    level=prediction.now,
                    x_t=prediction.sample,
                    output=prediction.output,
                    x0=prediction.x0,
                    noise=prediction.noise,
                )
            )
            torch.set_grad_enabled(False)
        if point + 1 == len(self._points):
            raise LoopLeft
        self._next = point + 1
        x_t = self._points[max(self._next, 0)][1]
        if x_t.shape != prediction.sample.shape:
            raise ValueError(
                f"point {max(self._next, 0)} has shape {tuple(x_t.shape)}, expected {tuple(prediction.sample.shape)}"
            )
        return x_t.to(prediction.sample)


class Backpropagator(Driver):
    """Steps with the graph kept; the denoiser is differentiated at the chosen steps only.

    Args:
        take_step: draws a step.
        grad_steps: the steps whose denoiser call is differentiated.
        stop: end at this step, with the clean sample that it predicts; ``None`` runs to the end.
    """

    outlived = True

    def __init__(self, take_step: TakeStep, grad_steps: frozenset[int], stop: int | None) -> None:
        self._take_step = take_step
        self._grad_steps = grad_steps
        self._stop = stop
        self._predicted: Tensor | None = None

    def action(self, index: int) -> Action:
        """Differentiate the chosen steps, and skip those after the stop."""
        if self._stop is not None and index > self._stop:
            return "skip"
        return "grad" if index in self._grad_steps else "run"

    def step(self, prediction: Prediction) -> Tensor:
        """Return the drawn x' with its graph, and the predicted clean sample from the stop on."""
        if prediction.index == self._stop:
            self._predicted = prediction.x0.to(prediction.sample.dtype)
        if self._predicted is not None:
            return self._predicted
        return self._take_step(prediction)[0]


class Decoder(Driver):
    """Runs the loop without the denoiser and ends it with the given latents ``(B, *latent)``."""

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents

    def action(self, index: int) -> Action:
        """Skip the denoiser."""
        return "skip"

    def step(self, prediction: Prediction) -> Tensor:
        """Return the sample as it is, and the latents at the last step."""
        if not prediction.last:
            return prediction.sample
        # What the pipeline does after its loop is the decoding, and it is to carry the graph.
        torch.set_grad_enabled(True)
        return self._latents.to(prediction.sample.dtype)


class PullBack(Driver):
    """Runs one step on a leaf and multiplies a vector by the Jacobian of its mean.

    Args:
        trajectory: the recorded samples.
        index: the step, at least 1.
        vector: ``(B, *latent)``.

    Attributes:
        result: ``(B, *latent)`` the product, once the loop has been run.
    """

    def __init__(self, trajectory: Trajectory, index: int, vector: Tensor) -> None:
        self._trajectory = trajectory
        self._index = index
        self._vector = vector
        self._leaf: Tensor | None = None
        self.result: Tensor | None = None

    def action(self, index: int) -> Action:
        """Differentiate the one step."""
        return "grad" if index == self._index else "skip"

    def restart(self) -> bool:
        """Begin again."""
        self._leaf = None
        return True

    def step(self, prediction: Prediction) -> Tensor:
        """Lead to the step along the recorded samples, and differentiate it."""
        if self._leaf is not None:
            mean = prediction.transition().mean
            (slope,) = torch.autograd.grad(mean, self._leaf, self._vector.to(mean))
            self.result = working(slope.detach())
            torch.set_grad_enabled(False)
            raise LoopLeft
        following = self._trajectory.step_out(prediction.index).to(prediction.sample)
        if prediction.index + 1 < self._index:
            return following
        # From here to the step itself the pipeline's own lines (blending, scaling, doubling for guidance) belong to
        # the graph.
        torch.set_grad_enabled(True)
        self._leaf = following.detach().clone().requires_grad_()
        return self._leaf.view_as(self._leaf)


def _same_sample(sample: Tensor, stored: Tensor) -> bool:
    """Whether the pipeline holds the recorded sample, up to what another batch size changes in its last digits."""
    if sample.dtype != stored.dtype or sample.shape != stored.shape:
        return False
    if torch.equal(sample, stored):
        return True
    bound = 1e-4 if sample.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((sample - stored).abs().max() <= bound * (1 + stored.abs().max()))
