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
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from difftune.noise import keyed_noise
from difftune.prompts import Prompt
from difftune.registry import Registry
from difftune.transition import Gaussian, Level, add_noise, working
from difftune.types import NonFiniteError, RewardOutput, SampleKey, Trajectory, UserError

if TYPE_CHECKING:
    # The contract speaks of what is handed to it; at run time it stands below all three.
    from difftune.policy import Policy
    from difftune.reward import Reward
    from difftune.sampler import PointView, Sampler, StepView

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
        generator: a CPU generator keyed by (seed, epoch, pass, minibatch): the same draws in each of its micro-batches.
        epoch: the epoch, from 1.
        step: optimizer steps taken so far.
        report: where algorithms of ``gradient`` evidence leave the rewards they saw, for the log.
    """

    sampler: Sampler
    policy: Policy
    reward: Reward
    weight: float
    generator: torch.Generator
    epoch: int
    step: int
    report: Callable[[RewardOutput], None] = lambda rewards: None

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
        needs_gradient: whether the reward must be differentiable.
        compares: what it does within a prompt's samples ("compares"), if it needs several of them; else empty.
        draws_rest: with labelled pictures (:meth:`examples`), whether what is missing of a prompt's samples is drawn.
        paper: title, authors, year and identifier of the source.
        Config: its settings.
        metrics: name to meaning of what :meth:`accumulate` returns.
        behaviour: the adapter that draws the rollouts; ``default`` is the one that is trained.
        noise: dynamics to the one noise level that will do, for methods that need a certain one; it is taken where
            ``sampler.eta`` is left open.
    """

    name: ClassVar[str] = "unnamed"
    evidence: ClassVar[Evidence]
    needs_gradient: ClassVar[bool] = False
    compares: ClassVar[str] = ""
    draws_rest: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    metrics: ClassVar[Mapping[str, str]] = {}
    behaviour: ClassVar[str] = "default"
    noise: ClassVar[Mapping[str, float]] = {}

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
        if self.needs_gradient and not reward.differentiable:
            raise UserError(
                f"algorithm {self.name!r} needs a reward with gradients, and {reward.name!r} has none; choose a "
                "differentiable reward (difftune list rewards) or a policy-gradient algorithm"
            )
        examples = self.examples()
        if examples is not None:
            require_pictures(self, examples, plan)
        elif self.compares:
            require_group(self.name, plan, self.compares)

    def examples(self) -> Sequence[Prompt] | None:
        """Return labelled pictures to train on in place of rollouts, or ``None`` to draw.

        Each prompt's metadata has ``images`` and ``labels``: see :func:`~difftune.preferences.load_preferences`.
        """
        return None

    def setup(self, policy: Policy) -> None:  # noqa: B027
        """Called once before the first epoch: store adapters, for example."""

    def prepare(self, prompts: Sequence[str], rewards: RewardOutput) -> Prepared:
        """Turn an epoch's rewards ``(B,)`` into per-sample values; no gradients.

        Args:
            prompts: ``B`` prompts; equal ones form a group. With labelled pictures these are the examples' names.
            rewards: their rewards, or the pictures' labels.
        """
        return Prepared({})

    @abstractmethod
    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Run forward and backward on a micro-batch; gradients add up in ``.grad``. Returns metrics (batch means)."""

    def after_step(self, policy: Policy, step: int) -> None:  # noqa: B027
        """Called after each optimizer step: update stored adapters, for example."""

    def after_epoch(self, policy: Policy, step: int) -> None:  # noqa: B027
        """Called when all updates on a rollout are done, ``step`` optimizer steps since the run began."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the policy: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore :meth:`state_dict`."""


class TransitionConfig(AlgorithmConfig):
    """Settings of the algorithms that replay steps."""

    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the noisy steps trained per update, drawn at random."
    )


class TransitionAlgorithm(Algorithm):
    """An algorithm whose loss is a mean over samples and replayed steps; subclasses give :meth:`step_loss`.

    Losses are averaged over the chosen steps and over samples (not summed): the learning rate does not depend on how
    many steps are trained. A configuration without ``timestep_fraction`` trains all noisy steps; one with a
    ``kl_weight`` above 0 is handed the base model's transitions.
    """

    evidence: ClassVar[Evidence] = "transitions"
    Config: ClassVar[type[AlgorithmConfig]] = TransitionConfig
    metrics: ClassVar[Mapping[str, str]] = {"loss": "The loss, mean over samples and trained steps."}

    def step_loss(
        self, view: StepView, values: Mapping[str, Tensor], reference: Gaussian | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss ``(B,)`` of one step, with its graph, and metrics ``(B,)`` without.

        Losses that are not one per sample (pairs) are given to :meth:`train_steps` instead.
        """
        raise NotImplementedError

    def needs_reference(self) -> bool:
        """Whether :meth:`step_loss` wants the base model's transition."""
        return getattr(self.config, "kl_weight", 0) > 0

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Replay the chosen steps, and run backward at each as soon as its loss is known."""
        return self.train_steps(batch, context, lambda view, base: self.step_loss(view, batch.values, base))

    def train_steps(
        self,
        batch: Batch,
        context: Context,
        loss_of: Callable[[StepView, Gaussian | None], tuple[Tensor, dict[str, Tensor]]],
        steps: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Replay the chosen steps; ``loss_of`` gives each one's losses ``(N,)``, whose mean is trained on.

        Args:
            batch: the micro-batch.
            context: sampler, policy and the micro-batch's weight.
            loss_of: gets the step and the base model's transition there, if that is wanted.
            steps: the steps to train; by default they are chosen at random.
        """
        trajectory = batch.trajectory
        assert trajectory is not None
        if steps is None:
            steps = context.choose_steps(trajectory, getattr(self.config, "timestep_fraction", 1.0))
        reference: Mapping[int, Gaussian] = {}
        if self.needs_reference():
            with context.policy.reference():
                reference = context.sampler.transitions(trajectory, steps)
        meter = Meter()

        def on_step(view: StepView) -> None:
            base = reference.get(view.index)
            loss, stats = loss_of(view, None if base is None else base.to(view.mean.device))
            require_finite_loss(self.name, loss, batch.prompts, f"step {view.index}")
            (loss.mean() * (context.weight / len(steps))).backward()
            meter.add(loss=loss, **stats)

        context.sampler.replay(trajectory, on_step, steps)
        return meter.means()


def importance_sampling_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Return PPO's loss ``(B,)``: max(-A w, -A clip(w, 1 - eps, 1 + eps)) with w = exp(log_prob - old_log_prob)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


#: What :func:`ratio_stats` and :func:`add_kl` report.
RATIO_METRICS: Mapping[str, str] = {
    "ratio": "Ratio to the policy that sampled, of mean log-probs; 1 in the first update of an epoch.",
    "clip_fraction": "Share of samples and steps whose ratio is outside the clip range.",
    "log_prob": "Log-prob of the stored steps, mean over dimensions.",
    "kl_old": "KL to the policy that sampled, to second order, summed over dimensions.",
    "kl": "KL of the steps to the base model, mean over dimensions (with `kl_weight` above 0).",
}


def add_kl(
    loss: Tensor, stats: dict[str, Tensor], view: StepView, reference: Gaussian | None, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add ``weight`` times the exact KL ``(B,)`` of the step's Gaussian to the base model's, mean over dimensions."""
    if reference is None:
        return loss, stats
    kl = view.gaussian.kl(reference)
    return loss + weight * kl, {**stats, "kl": kl.detach()}


def ratio_stats(view: StepView, clip_range: float, clipped: Tensor | None = None) -> dict[str, Tensor]:
    """Return ``(B,)`` metrics of a step's ratio to the policy that sampled.

    Args:
        view: the step.
        clip_range: what the ratio is clipped to.
        clipped: ``(B,)`` log of the ratio that is clipped, where that is not the plain one.
    """
    log_ratio = (view.log_prob - view.old_log_prob).detach()
    ratio = (log_ratio if clipped is None else clipped.detach()).exp()
    return {
        "ratio": ratio,
        "clip_fraction": ((ratio - 1).abs() > clip_range).float(),
        "log_prob": view.log_prob.detach(),
        # KL to the policy that sampled, to second order: half the squared log-ratio, summed over dimensions.
        "kl_old": 0.5 * (view.dims * log_ratio) ** 2,
    }


def require_group(name: str, plan: Plan, why: str) -> None:
    """Refuse runs with a single sample per prompt.

    Raises:
        UserError: saying what the algorithm does within a prompt.
    """
    if plan.samples_per_prompt < 2:
        raise UserError(
            f"algorithm {name!r} {why} within a prompt's samples, and samples_per_prompt is "
            f"{plan.samples_per_prompt}; set train.samples_per_prompt to 2 or more"
        )


def require_pictures(algorithm: Algorithm, examples: Sequence[Prompt], plan: Plan) -> None:
    """Refuse labelled pictures that are not as many per prompt as the run has samples.

    Raises:
        UserError: naming the number that fits.
    """
    counts = sorted({len(example.metadata["images"]) for example in examples})
    if len(counts) > 1:
        raise UserError(
            f"algorithm.data: the file has from {counts[0]} to {counts[-1]} pictures a line, expected the same "
            "number in every line; split it into one file for each"
        )
    rest = plan.samples_per_prompt - counts[0]
    if (rest > 0) if algorithm.draws_rest else (rest == 0):
        return
    wanted = counts[0] + (1 if algorithm.draws_rest else 0)
    raise UserError(
        f"algorithm.data: the file has {counts[0]} pictures a line, and samples_per_prompt is "
        f"{plan.samples_per_prompt}; set train.samples_per_prompt to {wanted}"
    )


# -- samples -----------------------------------------------------------------------------------------------------


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 <= low < high <= 1:
        raise ValueError(f"got ({low:g}, {high:g}), expected 0 <= low < high <= 1")
    return bounds


Shares = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""A part of a schedule or of the steps, from one share of it to another, in [0, 1]."""


class SampleConfig(AlgorithmConfig):
    """Settings of the algorithms that re-noise finished samples."""

    timesteps: int = Field(
        4, ge=1, description="Noise levels at which each sample is trained per update (papers: 1; AWM: 6)."
    )
    timestep_range: Shares = Field(
        (0.0, 1.0), description="Part of the schedule that noise levels are drawn from; 0 is the picture, 1 pure noise."
    )
    timestep_sampling: Literal["uniform", "logit_normal", "sampler"] = Field(
        "uniform",
        description="How noise levels are drawn: evenly (DDPM), logit-normal (Stable Diffusion 3), or from the "
        "sampler's own steps.",
    )
    fit_guidance: float | None = Field(
        None, gt=0, description="Guidance scale of the prediction that is fitted: 1, the bare one; null, the sampler's."
    )


class BareConfig(SampleConfig):
    """Settings of the algorithms that fit the bare conditional prediction, however the samples were guided."""

    fit_guidance: float | None = Field(
        1.0, gt=0, description="Guidance scale of the fitted prediction: 1, the bare one (paper); null: the sampler's."
    )


def draw_times(count: int, bounds: tuple[float, float], sampling: str, generator: torch.Generator) -> list[float]:
    """Return ``count`` stratified random fractions of the schedule, one from each of ``count`` equal shares.

    ``logit_normal`` is the sigmoid of a standard normal (Esser et al. 2024, eq. 19, with m = 0 and s = 1); both are
    then scaled into ``bounds``.
    """
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    shares = ((torch.arange(count) + jitter) / count).clamp(1e-3, 1 - 1e-3)
    if sampling == "logit_normal":
        shares = torch.sigmoid(torch.special.ndtri(shares))
    low, high = bounds
    return (low + (high - low) * shares).tolist()


@dataclass(frozen=True)
class Endpoints:
    """The clean sample and the noise that a noisy sample is made of, as they are or as a model predicts them.

    Attributes:
        x0: ``(B, *latent)`` clean sample.
        noise: ``(B, *latent)`` noise.
    """

    x0: Tensor
    noise: Tensor

    @property
    def velocity(self) -> Tensor:
        """``(B, *latent)`` noise - x0, the velocity of flow models."""
        return self.noise - self.x0


Space = Literal["noise", "velocity", "x0"]


def squared_error(predicted: Endpoints, truth: Endpoints, space: Space) -> Tensor:
    """Return ``(B,)`` squared errors, averaged over dimensions, in the space of noise, velocity or clean samples.

    On a straight path at time t they are (1 - t)^2, 1 and t^2 times the velocity's.
    """
    return (getattr(predicted, space) - getattr(truth, space)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Point:
    """A micro-batch at one noise level of the forward process.

    Attributes:
        timestep: the training timestep.
        level: its noise level.
        space: what the model was trained to predict: ``velocity`` (flow models) or ``noise``.
        truth: the finished samples and the noise that was added.
        predicted: what the policy makes of x_t, with its graph.
        others: adapter name to what it makes of x_t, without.
    """

    timestep: float
    level: Level
    space: Space
    truth: Endpoints
    predicted: Endpoints
    others: Mapping[str, Endpoints]

    def error(self, adapter: str | None = None, space: Space | None = None) -> Tensor:
        """Return ``(B,)`` mean squared errors of the policy or of a stored adapter, in the model's own space."""
        predicted = self.predicted if adapter is None else self.others[adapter]
        return squared_error(predicted, self.truth, space or self.space)


def is_flow(sampler: Sampler) -> bool:
    """Whether the sampler's model is a flow model: its levels lie on the straight path, alpha = 1 - sigma."""
    level = sampler.level(sampler.timestep(0.5))
    return math.isclose(level.alpha + level.sigma, 1.0, abs_tol=1e-6)


class SampleAlgorithm(Algorithm):
    """An algorithm whose loss is a mean over finished samples and noise levels; subclasses give :meth:`point_loss`.

    Noise levels are drawn once per minibatch, noise per sample: how a minibatch is cut into micro-batches changes
    nothing. The model is asked through the pipeline's own call, with the guidance of ``fit_guidance`` where that is
    set and else with the one it samples with.

    Attributes:
        shared_noise: the noise belongs to the prompt, so that the samples of a pair get the same.
    """

    evidence: ClassVar[Evidence] = "samples"
    Config: ClassVar[type[AlgorithmConfig]] = SampleConfig
    metrics: ClassVar[Mapping[str, str]] = {"loss": "The loss, mean over samples (or pairs) and noise levels."}
    shared_noise: ClassVar[bool] = False

    @abstractmethod
    def point_loss(self, point: Point, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses ``(N,)``, whose mean is trained on, with their graph, and metrics without."""

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the further adapters that :meth:`point_loss` compares with."""
        return ()

    def _timesteps(self, trajectory: Trajectory, context: Context) -> list[float]:
        """Draw the timesteps of a minibatch: of the schedule, or of the steps that drew the samples."""
        config, steps = self.config, trajectory.times.tolist()
        own = config.timestep_sampling == "sampler"
        sampling = "uniform" if own else config.timestep_sampling
        shares = draw_times(config.timesteps, config.timestep_range, sampling, context.generator)
        if not own:
            return [context.sampler.timestep(u) for u in shares]
        # Steps go from pure noise to the picture, shares the other way; a step counts once.
        return list(dict.fromkeys(steps[min(int((1 - u) * len(steps)), len(steps) - 1)] for u in shares))

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Noise the samples, ask every adapter, and run backward at each noise level."""
        trajectory = batch.trajectory
        assert trajectory is not None
        config, sampler = self.config, context.sampler
        times = self._timesteps(trajectory, context)
        salt = int(torch.randint(2**31, (1,), generator=context.generator))
        x0 = working(trajectory.states[:, -1]).to(context.policy.device)
        keys = [replace(key, sample=-1) for key in batch.keys] if self.shared_noise else batch.keys
        space: Space = "velocity" if is_flow(sampler) else "noise"
        points: list[tuple[float, Tensor]] = []
        truths: list[Endpoints] = []
        for number, timestep in enumerate(times):
            truth = Endpoints(x0, keyed_noise(keys, f"forward{salt}.{number}", x0))
            truths.append(truth)
            points.append((timestep, add_noise(truth.x0, truth.noise, sampler.level(timestep))))

        def probe(on_point: Callable[[PointView], Any], grad: bool) -> None:
            sampler.probe(
                batch.prompts,
                points,
                on_point,
                keys=batch.keys,
                conditions=trajectory.conditions,
                grad=grad,
                guidance_scale=config.fit_guidance,
            )

        others: dict[str, list[Endpoints]] = {}
        for name in self.adapters():
            found = others.setdefault(name, [])
            with context.policy.adapter(name):
                probe(lambda view, found=found: found.append(Endpoints(view.x0, view.noise)), False)  # type: ignore[misc]
        meter = Meter()

        def on_point(view: PointView) -> None:
            point = Point(
                timestep=view.timestep,
                level=view.level,
                space=space,
                truth=truths[view.index],
                predicted=Endpoints(view.x0, view.noise),
                others={name: found[view.index] for name, found in others.items()},
            )
            loss, stats = self.point_loss(point, batch)
            require_finite_loss(self.name, loss, batch.prompts, f"timestep {view.timestep:g}")
            (loss.mean() * (context.weight / len(points))).backward()
            meter.add(loss=loss, **stats)

        probe(on_point, True)
        return meter.means()


# -- gradient ----------------------------------------------------------------------------------------------------


class GradientConfig(AlgorithmConfig):
    """Settings of the algorithms that differentiate the reward."""

    loss: Literal["negative", "target", "hinge"] = Field(
        "negative", description="negative: -r; target: |r - target|; hinge: max(0, target - r), no gradient above it."
    )
    target: float | None = Field(None, description="The reward aimed at (loss: target or hinge).")
    loss_scale: float = Field(1.0, gt=0, description="Factor of the loss; it matters beside max_grad_norm only.")

    @model_validator(mode="after")
    def _target_is_given(self) -> GradientConfig:
        if self.loss != "negative" and self.target is None:
            raise ValueError(f"loss: {self.loss} needs a target: set algorithm.target")
        return self


def reward_loss(reward: Tensor, form: str, target: float | None, scale: float) -> Tensor:
    """Return ``(B,)`` losses of rewards ``(B,)``: see :class:`GradientConfig`."""
    if form == "negative":
        return -scale * reward
    assert target is not None
    return scale * ((reward - target).abs() if form == "target" else torch.relu(target - reward))


class GradientAlgorithm(Algorithm):
    """An algorithm that follows the reward's own gradient; subclasses give :meth:`draws`.

    Samples are drawn at each update, under the weights of that update.
    """

    evidence: ClassVar[Evidence] = "gradient"
    needs_gradient: ClassVar[bool] = True
    Config: ClassVar[type[AlgorithmConfig]] = GradientConfig
    metrics: ClassVar[Mapping[str, str]] = {"loss": "The loss of the rewards, mean over samples and draws."}

    @abstractmethod
    def draws(self, batch: Batch, context: Context) -> Iterator[tuple[Tensor, float]]:
        """Yield images ``(B, 3, H, W)`` with their graph, and each draw's share of the loss (shares add up to 1)."""

    def accumulate(self, batch: Batch, context: Context) -> dict[str, float]:
        """Draw, score and run backward; the first draw's rewards are the ones that are logged."""
        config = self.config
        meter = Meter()
        for number, (images, share) in enumerate(self.draws(batch, context)):
            rewards = context.reward(images, batch.prompts, batch.metadata)
            if number == 0:
                context.report(rewards)
            loss = reward_loss(rewards.total, config.loss, config.target, config.loss_scale)
            require_finite_loss(self.name, loss, batch.prompts, f"draw {number}")
            if not loss.requires_grad:
                # Constant in the pixels of these samples (no text is wanted, say): their gradient is 0.
                loss = loss + 0.0 * images.flatten(1).mean(1)
            (loss.mean() * (context.weight * share)).backward()
            meter.add(loss=loss)
        return meter.means()


# -- shared pieces -----------------------------------------------------------------------------------------------


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
        # A loss of pairs has no prompt of its own.
        whose = f"sample {bad} (prompt {prompts[bad]!r})" if len(loss) == len(prompts) else f"pair {bad}"
        raise NonFiniteError(
            f"algorithm {name!r}: the loss of {whose} at {where} is {float(loss.detach()[bad])}; "
            "the weights are unchanged: lower algorithm.lr or raise sampler.eta"
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
