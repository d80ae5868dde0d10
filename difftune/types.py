"""The records that travel through a run: frozen, self-validating, with their shapes in the docstrings.

Shape letters: ``B`` samples, ``T`` denoising steps, ``F`` video frames, ``H``/``W`` pixels, ``*latent`` whatever shape
the pipeline's own latents have (packed tokens, images, videos or audio).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A reward, loss, gradient or latent is NaN or infinite; the message names the sample and the remedy."""


class ParityError(RuntimeError):
    """Replaying a rollout did not give its own log-probs, or gradients did not reach the adapter and only it."""


class UserError(ValueError):
    """The user's mistake: one line that says what was got, what was expected and what to do (exit code 2)."""


@dataclass(frozen=True)
class SampleKey:
    """What identifies one sample of a run, and hence its noise: nothing else enters the random streams.

    Attributes:
        seed: the run's seed.
        epoch: the epoch the sample belongs to.
        prompt: the prompt's text.
        sample: the sample's number among those of the same prompt in that epoch.
    """

    seed: int
    epoch: int
    prompt: str
    sample: int


@dataclass(frozen=True)
class Trajectory:
    """One recorded rollout: the states x_T ... x_0, the transitions between them and the decoded images.

    Attributes:
        states: ``(B, T+1, *latent)``; ``states[:, 0]`` is x_T, ``states[:, k]`` the sample that step k received and
            ``states[:, T]`` the one that was decoded.
        times: ``(T,)`` the pipeline's own timesteps.
        log_probs: ``(B, T)`` fp32, the log-density of the step taken, averaged over the latent's dimensions
            (multiply by :attr:`dims` for the sum); 0 where the step carries no noise.
        stochastic: ``(T,)`` bool, the steps that carry noise.
        prompts: ``B`` prompts.
        keys: ``B`` noise keys.
        images: ``(B, 3, H, W)`` or ``(B, F, 3, H, W)`` in [0, 1], fp32; ``None`` if decoding was switched off.
        steps_out: ``(B, T, *latent)`` what step k returned, where the pipeline changes the sample between two steps
            (inpainting blends the known region in); ``None`` when it is ``states[:, 1:]``.
        kept: ``(B, T, *latent)`` bool, the dimensions of x' that the pipeline goes on with; the others, which it
            overwrites, are left out of log-probs. ``None`` when it keeps all.
        conditions: further arguments of the pipeline's call, per sample lists or tensors of length ``B``.
    """

    states: Tensor
    times: Tensor
    log_probs: Tensor
    stochastic: Tensor
    prompts: tuple[str, ...]
    keys: tuple[SampleKey, ...]
    images: Tensor | None = None
    steps_out: Tensor | None = None
    kept: Tensor | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, steps = self.log_probs.shape
        if self.states.shape[:2] != (batch, steps + 1):
            raise ValueError(
                f"states has shape {tuple(self.states.shape)}, expected ({batch}, {steps + 1}, ...) to go with "
                f"log_probs of shape {tuple(self.log_probs.shape)}"
            )
        if self.times.shape != (steps,) or self.stochastic.shape != (steps,):
            raise ValueError(
                f"times {tuple(self.times.shape)} and stochastic {tuple(self.stochastic.shape)} "
                f"must both have shape ({steps},)"
            )
        if len(self.prompts) != batch or len(self.keys) != batch:
            raise ValueError(f"{len(self.prompts)} prompts and {len(self.keys)} keys for {batch} samples")
        if self.images is not None and len(self.images) != batch:
            raise ValueError(f"{len(self.images)} images for {batch} samples")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return self.log_probs.shape[1]

    @property
    def dims(self) -> int:
        """The number of dimensions d of one latent: the sum log-prob is d times the mean one."""
        return self.states[0, 0].numel()

    @property
    def stochastic_steps(self) -> list[int]:
        """The indices of the steps that carry noise, in order."""
        return self.stochastic.nonzero().flatten().tolist()

    def step_out(self, index: int) -> Tensor:
        """Return ``(B, *latent)``, what step ``index`` returned (x')."""
        return self.states[:, index + 1] if self.steps_out is None else self.steps_out[:, index]

    def on_host(self) -> Trajectory:
        """Return the trajectory with its large tensors (states, masks, images) in the host's memory, pinned."""

        def moved(value: Tensor | None) -> Tensor | None:
            return value if value is None or value.device.type == "cpu" else value.to("cpu").pin_memory()

        tensors: dict[str, Any] = {
            name: moved(getattr(self, name)) for name in ("states", "steps_out", "kept", "images")
        }
        return dataclasses.replace(self, **tensors)

    def select(self, indices: Sequence[int] | Tensor) -> Trajectory:
        """Return the trajectory of the samples ``indices``, in that order."""
        idx = torch.as_tensor(indices, dtype=torch.long)
        rows = idx.tolist()

        def take(value: Any) -> Any:
            if value is None or isinstance(value, Tensor):
                return None if value is None else value[idx.to(value.device)]
            return type(value)(value[i] for i in rows)

        return dataclasses.replace(
            self,
            states=take(self.states),
            log_probs=take(self.log_probs),
            prompts=take(self.prompts),
            keys=take(self.keys),
            images=take(self.images),
            steps_out=take(self.steps_out),
            kept=take(self.kept),
            conditions={name: take(value) for name, value in self.conditions.items()},
        )

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join trajectories of the same length and times along the batch."""
        first = parts[0]
        if len(parts) == 1:
            return first
        if any(not torch.equal(p.times, first.times) for p in parts):
            raise ValueError("trajectories with different timesteps cannot be joined")

        def join(name: str) -> Any:
            values = [getattr(p, name) for p in parts]
            if all(v is None for v in values):
                return None
            return torch.cat(values)

        # A pipeline alters the sample between steps for all rollouts or for none; a rollout in which it happened to
        # change nothing is written out in full so that the rows line up.
        out: Tensor | None = None
        if any(p.steps_out is not None for p in parts):
            out = torch.cat([p.states[:, 1:] if p.steps_out is None else p.steps_out for p in parts])
        kept: Tensor | None = None
        if any(p.kept is not None for p in parts):
            kept = torch.cat([torch.ones_like(p.states[:, 1:], dtype=torch.bool) if p.kept is None else p.kept
                              for p in parts])  # fmt: skip
        conditions: dict[str, Any] = {}
        for name, value in first.conditions.items():
            values = [p.conditions[name] for p in parts]
            if isinstance(value, Tensor):
                conditions[name] = torch.cat(values)
            else:
                conditions[name] = type(value)(item for v in values for item in v)
        return dataclasses.replace(
            first,
            states=join("states"),
            log_probs=join("log_probs"),
            images=join("images"),
            steps_out=out,
            kept=kept,
            prompts=tuple(p for part in parts for p in part.prompts),
            keys=tuple(k for part in parts for k in part.keys),
            conditions=conditions,
        )


@dataclass(frozen=True)
class RewardOutput:
    """What a reward says of a batch.

    Attributes:
        total: ``(B,)`` fp32, the score that is trained on; higher is better.
        parts: name to ``(B,)`` fp32, the scores the total is made of, for the log.
        uncertainty: ``(B,)`` fp32, one standard deviation of the score, where the scorer knows it.

    Example:
        ``RewardOutput(total=torch.tensor([0.5]), parts={"count": torch.tensor([1.0]), "colour": torch.tensor([0.0])})``
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    uncertainty: Tensor | None = None

    def __post_init__(self) -> None:
        if self.total.ndim != 1:
            raise ValueError(f"total has shape {tuple(self.total.shape)}, expected (B,)")
        named = {**self.parts, **({} if self.uncertainty is None else {"uncertainty": self.uncertainty})}
        for name, value in named.items():
            if value.shape != self.total.shape:
                raise ValueError(
                    f"part {name!r} has shape {tuple(value.shape)}, expected {tuple(self.total.shape)} as the total"
                )

    def __len__(self) -> int:
        return len(self.total)


@dataclass(frozen=True)
class Rollout:
    """A trajectory with its rewards: all that an algorithm sees of an epoch.

    Attributes:
        trajectory: the recorded samples.
        rewards: ``(B,)`` fp32 rewards that are trained on.
        parts: name to ``(B,)``, for algorithms that normalise each part by itself.
        uncertainty: ``(B,)`` or ``None``.
    """

    trajectory: Trajectory
    rewards: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    uncertainty: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rewards.shape != (len(self.trajectory),):
            raise ValueError(f"{tuple(self.rewards.shape)} rewards for {len(self.trajectory)} samples")

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The ``B`` prompts."""
        return self.trajectory.prompts


@dataclass(frozen=True)
class Metrics:
    """One epoch's record: plain numbers, ready for JSON.

    Attributes:
        epoch: the epoch that was finished, counted from 1 (0 is the base model).
        step: optimizer steps taken since the run began.
        values: name to number, e.g. ``reward/mean``, ``ratio/mean``, ``clip_fraction``, ``grad_norm``.
        seconds: seconds per phase: rollout, score, update, save. Wall-clock, hence never the same twice.
    """

    epoch: int
    step: int
    values: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def record(self) -> dict[str, Any]:
        """Return the flat dictionary that is written to ``metrics.jsonl``."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            **dict(self.values),
            **{f"seconds/{name}": round(value, 4) for name, value in self.seconds.items()},
        }
