"""The algorithm contract: what a file in ``algorithms/`` provides, and what it is given.

An algorithm turns rewards into per-sample values (:meth:`Algorithm.prepare`, no gradients) and a micro-batch into
gradients (:meth:`Algorithm.accumulate`). What it needs from the sampler is its *evidence*:

- ``transitions``: the log-probs of recorded steps, replayed (policy gradients, per-step preferences);
- ``samples``: the finished samples, re-noised and probed (reward-weighted regression, DPO, forward-process methods);
- ``gradient``: images with a graph back to the weights, and a differentiable reward (AlignProp and its kin).

The trainer never names an algorithm; it calls this contract and nothing else.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from difftune.registry import Registry
from difftune.transition import Gaussian
from difftune.types import NonFiniteError, RewardOutput, SampleKey, Trajectory, UserError

if TYPE_CHECKING:
    # The contract speaks of what is handed to it; at run time it stands below all three.
    from difftune.policy import Policy
    from difftune.reward import Reward
    from difftune.sampler import Sampler, StepView

Evidence = Literal["transitions", "samples", "gradient"]


class AlgorithmConfig(BaseModel):
    """Settings that every algorithm has: the optimizer's (AdamW) and how often a rollout is used."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    lr: float = Field(3e-4, gt=0, description="Learning rate of AdamW (LoRA; the DDPO paper's LoRA setting is 3e-4).")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")
    inner_epochs: int = Field(1, ge=1, description="Passes over the samples of one rollout.")


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, for checks before it starts.

    Attributes:
        prompts_per_epoch: distinct draws of a prompt per epoch.
        samples_per_prompt: samples per drawn prompt (the group's size).
        updates_per_epoch: optimizer steps per pass over an epoch's samples.
    """

    prompts_per_epoch: int
    samples_per_prompt: int
    updates_per_epoch: int


@dataclass(frozen=True)
class Prepared:
    """What :meth:`Algorithm.prepare` makes of an epoch's rewards.

    Attributes:
        values: name to ``(B, ...)`` per-sample values (advantages, weights, labels).
        units: indices that belong together (pairs, groups): they are never split between minibatches. Samples that
            are in no unit are not trained on. ``None``: every sample by itself.
    """

    values: Mapping[str, Tensor]
    units: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        prompts: ``B`` prompts.
        keys: ``B`` noise keys.
        values: the rows of :attr:`Prepared.values`.
        trajectory: the recorded samples; ``None`` for ``gradient`` evidence.
        conditions: further arguments of the pipeline, one per sample.
        metadata: one mapping per sample.
        units: the micro-batch's units, as indices into the batch.
    """

    prompts: tuple[str, ...]
    keys: tuple[SampleKey, ...]
    values: Mapping[str, Tensor]
    trajectory: Trajectory | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    metadata: Sequence[Mapping[str, Any]] = ()
    units: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Context:
    """What an algorithm may use while it accumulates gradients.

    Attributes:
        sampler: replays, probes, backpropagates.
        policy: reference and stored adapters.
        reward: the reward, for ``gradient`` evidence.
        weight: this micro-batch's share of its minibatch: losses are means over the micro-batch times ``weight``.
        generator: a CPU generator keyed by (seed, epoch, pass, minibatch, micro-batch).
        epoch: the epoch, from 1.
        step: optimizer steps taken so far.
    """

    sampler: Sampler
    policy: Policy
    reward: Reward
    weight: float
    generator: torch.Generator
    epoch: int
    step: int

    def choose_steps(self, trajectory: Trajectory, fraction: float) -> list[int]:
        """Return a random subset of the stochastic steps, ``fraction`` of them and at least one, in order."""
        steps = trajectory.stochastic_steps
        count = max(1, round(fraction * len(steps)))
        if count >= len(steps):
            return steps
        chosen = torch.randperm(len(steps), generator=self.generator)[:count].tolist()
        return sorted(steps[i] for i in chosen)


C = TypeVar("C", bound=AlgorithmConfig)


class Algorithm(ABC):
    """One method. Subclasses live in one file each and are registered by :func:`algorithm`.

    Attributes:
        name: the registered name.
        evidence: what it needs of the sampler.
        paper: title, authors, year and identifier of the source.
        Config: its settings.
    """

    name: ClassVar[str] = "unnamed"
    evidence: ClassVar[Evidence]
    paper: ClassVar[str] = ""
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config: Any = config

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse combinations that cannot work, before anything is sampled.

        Raises:
            UserError: with the reason and the remedy. Subclasses add their own conditions and call this one.
        """
        if self.evidence == "transitions" and (sampler.dynamics == "ode" or sampler.eta <= 0 or sampler.window == ()):
            raise UserError(
                f"algorithm {self.name!r} needs the log-probs of noisy steps, but the sampler is deterministic "
                f"(dynamics={sampler.dynamics}, eta={sampler.eta:g}); set sampler.eta above 0"
            )
        if self.evidence == "gradient" and not reward.differentiable:
            raise UserError(
                f"algorithm {self.name!r} needs a reward with gradients, and {reward.name!r} has none; choose a "
                "differentiable reward (difftune list rewards) or a policy-gradient algorithm"
            )

    def setup(self, policy: Policy) -> None:  # noqa: B027
        """Called once before the first epoch: store adapters, for example."""

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Turn an epoch's rewards ``(B,)`` into per-sample values; no gradients."""
        return Prepared({})

    @abstractmethod
    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Run forward and backward on a micro-batch; gradients add up in ``.grad``. Returns metrics (batch means)."""

    def after_step(self, policy: Policy, step: int) -> None:  # noqa: B027
        """Called after each optimizer step: update stored adapters, for example."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the policy: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore :meth:`state_dict`."""


class TransitionAlgorithm(Algorithm):
    """An algorithm whose loss is a mean over samples and replayed steps; subclasses give :meth:`step_loss`.

    Losses are averaged over the chosen steps and over samples (not summed): the learning rate does not depend on how
    many steps are trained.
    """

    evidence: ClassVar[Evidence] = "transitions"

    @abstractmethod
    def step_loss(
        self, view: StepView, values: Mapping[str, Tensor], reference: Gaussian | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss ``(B,)`` of one step, with its graph, and metrics ``(B,)`` without."""

    def timestep_fraction(self) -> float:
        """Return the share of the stochastic steps that a micro-batch trains."""
        return 1.0

    def needs_reference(self) -> bool:
        """Whether :meth:`step_loss` wants the reference policy's transition."""
        return False

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Replay the chosen steps, and run backward at each as soon as its loss is known."""
        trajectory = batch.trajectory
        assert trajectory is not None
        steps = context.choose_steps(trajectory, self.timestep_fraction())
        reference: Mapping[int, Gaussian] = {}
        if self.needs_reference():
            with context.policy.reference():
                reference = context.sampler.transitions(trajectory, steps)
        meter = Meter()

        def on_step(view: StepView) -> None:
            loss, stats = self.step_loss(view, batch.values, reference.get(view.index))
            require_finite_loss(self.name, loss, batch.prompts, f"step {view.index}")
            (loss.mean() * (context.weight / len(steps))).backward()
            meter.add(loss=loss, **stats)

        context.sampler.replay(trajectory, on_step, steps)
        return meter.means()


class Meter:
    """Means of metrics over steps."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, **values: Tensor | float) -> None:
        """Add one value per name; tensors are averaged."""
        for name, value in values.items():
            self._values[name].append(float(value.detach().float().mean()) if isinstance(value, Tensor) else value)

    def means(self) -> dict[str, float]:
        """Return the mean of everything added under each name."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}


def require_finite_loss(name: str, loss: Tensor, prompts: Sequence[str], where: str) -> None:
    """Stop before backward when a sample's loss ``(B,)`` is NaN or infinite.

    Raises:
        NonFiniteError: naming algorithm, sample and prompt.
    """
    finite = torch.isfinite(loss.detach())
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"algorithm {name!r}: the loss of sample {bad} (prompt {prompts[bad]!r}) at {where} is "
            f"{float(loss.detach()[bad])}; the weights are unchanged: lower algorithm.lr or raise sampler.eta"
        )


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", "difftune.algorithms", "difftune.algorithms")

A = TypeVar("A", bound=type[Algorithm])


def algorithm(name: str) -> Callable[[A], A]:
    """Register an :class:`Algorithm` subclass under ``name``."""

    def register(cls: A) -> A:
        if not (inspect.isclass(cls) and issubclass(cls, Algorithm)):
            raise TypeError(f"@algorithm({name!r}) got {cls!r}, expected a subclass of Algorithm")
        cls.name = name
        ALGORITHMS.add(name, cls, f"{cls.__module__}.{cls.__qualname__}")
        return cls

    return register


def build_algorithm(spec: str | Mapping[str, Any] | Algorithm, **settings: Any) -> Algorithm:
    """Build an algorithm.

    Args:
        spec: a registered name, ``{name: NAME, ...settings}``, or an :class:`Algorithm`, returned as it is.
        settings: its settings, with a name only.

    Raises:
        RegistryError: unknown name.
        pydantic.ValidationError: unknown or ill-typed settings, all at once.
    """
    if isinstance(spec, Algorithm):
        return spec
    if isinstance(spec, Mapping):
        settings = {key: value for key, value in spec.items() if key != "name"}
        spec = str(spec.get("name", ""))
    cls = ALGORITHMS.get(spec)
    return cls(cls.Config(**settings))


def list_algorithms() -> list[str]:
    """Return the names of all algorithms, built-in, installed and plugged in."""
    return list(ALGORITHMS)
