"""The loop: rollout -> score -> prepare -> minibatches -> loss -> step -> save, as a generator of metrics.

The trainer names no algorithm, no reward and no pipeline. All chance in it is keyed by (seed, epoch, ...), and all it
is lies in :meth:`Trainer.state_dict`, so a run that is interrupted and resumed goes on to the bit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from difftune import checkpoint
from difftune.algorithm import Algorithm, Batch, Context, Plan, Prepared
from difftune.export import save_adapter, save_weights
from difftune.labelled import LabelledPictures
from difftune.memory import brought, halving
from difftune.monitor import Monitor, MonitorAlarm, MonitorConfig
from difftune.policy import Policy
from difftune.processes import Processes, even_shares
from difftune.prompts import Prompt, PromptStream, conditions_of, load_prompts, metadata_of, told_apart
from difftune.report import sample_grid, write_report
from difftune.reward import Reward, build_reward
from difftune.sampler import Sampler, StepView, keyed_generator, sample_keys
from difftune.types import Metrics, NonFiniteError, RewardOutput, SampleKey, Trajectory, UserError

#: |ratio - 1| that another batch size may cause before the gate warns: the smallest clip range in use.
MICRO_BATCH_BOUND = 1e-4

#: How long processes wait for one another: longer than a slow scorer, sample grid or checkpoint takes.
PATIENCE = timedelta(hours=1)

T = TypeVar("T")

#: Called with (phase, done, total) while an epoch runs: what a progress display shows.
Listener = Callable[[str, int, int], None]


class TrainerConfig(BaseModel):
    """How long and how large a run is, and what it leaves behind."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(20, ge=1, description="Epochs: each is a rollout, its scores and its updates.")
    prompts_per_epoch: int = Field(16, ge=1, description="Prompts drawn per epoch.")
    samples_per_prompt: int = Field(4, ge=1, description="Samples per drawn prompt (the group's size).")
    updates_per_epoch: int = Field(2, ge=1, description="Optimizer steps per pass over an epoch's samples.")
    micro_batch: int = Field(16, ge=1, description="Samples per forward and backward; changes memory, not results.")
    seed: int = Field(0, ge=0, description="Seed of everything: prompts, noise, minibatches.")
    save_every: int = Field(5, ge=1, description="Epochs between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept.")
    sample_every: int = Field(5, ge=0, description="Epochs between sample grids; 0 for none.")
    sample_count: int = Field(16, ge=1, description="Pictures in a sample grid.")
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="With several processes: each holds the model (none), or a part of the frozen base (fsdp).",
    )

    @property
    def samples_per_epoch(self) -> int:
        """Samples per epoch over all processes."""
        return self.prompts_per_epoch * self.samples_per_prompt


@dataclass(frozen=True)
class _Samples:
    """The samples of an epoch over all processes: a pure function of (seed, epoch).

    Attributes:
        epoch: the epoch, from 1.
        texts, metadata, keys: the samples' prompts and noise keys, in order.
        groups: what tells the samples' prompts apart: their texts, and what they are conditioned on.
        conditions: further arguments of the pipeline's call, one value per sample.
        shares: the indices of the samples that each process draws, by rank.
    """

    epoch: int
    texts: list[str]
    metadata: list[Mapping[str, Any]]
    keys: list[SampleKey]
    groups: list[str]
    conditions: Mapping[str, list[Any]]
    shares: list[list[int]]

    def __len__(self) -> int:
        return len(self.texts)

    def conditions_at(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Return the conditions of these samples."""
        return {name: [values[i] for i in rows] for name, values in self.conditions.items()}


class Trainer:
    """Trains a policy; iterate over it for one :class:`~difftune.types.Metrics` per epoch.

    Args:
        policy, sampler, algorithm: the policy, the sampler that drives it, and the method.
        reward: a :class:`~difftune.reward.Reward`, or anything :func:`~difftune.reward.build_reward` takes.
        prompts: strings, :class:`~difftune.prompts.Prompt` records, or anything :func:`~difftune.prompts.load_prompts`
            takes.
        out: the run's folder; ``None`` writes nothing.
        sample_prompts: prompts of the sample grids; the first training prompts by default.
        config: sizes and intervals; or give its fields as keyword arguments.
        resume: continue from the newest checkpoint in ``out`` that verifies.
        base_model: the model's name, for the adapter's card.
        description: the resolved configuration, written to ``config.yaml`` by the command line and into the adapter.
        listener: called with (phase, done, total) while an epoch runs.
        monitor: rewards that are watched and not trained on: a list, a :class:`~difftune.monitor.MonitorConfig`, or a
            :class:`~difftune.monitor.Monitor`.
        idle_rewards: keep scorers in the host's memory, except while they score.

    Several processes (``accelerate launch``, ``torchrun``) share the samples, and take the same steps as one would, up
    to rounding; each makes its trainer, iterates over it and saves, and the first of them writes.

    Raises:
        UserError: a combination that cannot work, or a folder that already holds a run.

    Attributes:
        epoch: epochs finished.
        step: optimizer steps taken.
        parity: the figures of the parity gate, once it has run.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        sampler: Sampler,
        algorithm: Algorithm,
        reward: Reward | Any,
        prompts: Any,
        out: str | Path | None = None,
        sample_prompts: Any = None,
        config: TrainerConfig | None = None,
        resume: bool = False,
        base_model: str = "",
        description: Mapping[str, Any] | None = None,
        listener: Listener | None = None,
        monitor: Monitor | MonitorConfig | Sequence[Any] | None = None,
        idle_rewards: bool = False,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise UserError(f"Trainer: got config and {', '.join(settings)}, expected one or the other")
        self.config = config or TrainerConfig(**settings)
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self.processes = Processes(self.accelerator)
        self.policy = policy.to(self.accelerator.device)
        self.sampler = sampler
        self.algorithm = algorithm
        if idle_rewards and algorithm.needs_gradient:
            raise UserError(
                f"offload: algorithm {algorithm.name!r} follows the reward's gradient, which needs it beside the "
                "model; leave reward out of offload"
            )
        self._idle_rewards = idle_rewards
        self.reward = build_reward(reward).to("cpu" if idle_rewards else self.accelerator.device)
        self.prompts = load_prompts(prompts)
        self.sample_prompts = load_prompts(sample_prompts if sample_prompts is not None else self.prompts)
        for listed in (self.prompts, self.sample_prompts):
            self.sampler.check_conditions(conditions_of(listed))
        self.out = None if out is None else Path(out)
        self.base_model = base_model
        self.description = dict(description or {})
        self.listener = listener
        self.epoch = 0
        self.step = 0
        self.parity: dict[str, float] | None = None
        examples = self.algorithm.examples()
        self._labelled: LabelledPictures | None = None
        if examples is not None:
            self._labelled = LabelledPictures(sampler, algorithm, self.config.samples_per_prompt)
        self.monitor = self._build_monitor(monitor)
        self._stream = PromptStream(self.prompts if examples is None else examples, self.config.seed)
        plan = Plan(self.config.prompts_per_epoch, self.config.samples_per_prompt, self.config.updates_per_epoch)
        self.algorithm.check(sampler, self.reward, plan)
        settings_ = self.algorithm.config
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=settings_.lr,
            betas=settings_.betas,
            eps=settings_.adam_eps,
            weight_decay=settings_.weight_decay,
        )
        # Adapters begin at random: without this, processes that were not seeded alike would drift apart.
        if self.processes.count > 1:
            self.policy.load_state_dict(self.processes.from_first(self.policy.state_dict()))
        self.algorithm.setup(self.policy)
        if self.config.sharding == "fsdp":
            if self.config.samples_per_epoch < self.processes.count:
                raise UserError(
                    f"train.sharding: fsdp needs a sample per process, got {self.config.samples_per_epoch} samples per "
                    f"epoch for {self.processes.count} processes; raise train.samples_per_prompt"
                )
            self.processes.shard(self.policy)
            # All processes must call the model equally often, so none may cut its batches on its own.
            self.sampler.shrinks = False
        self._boundary: dict[str, Any] | None = None
        # Halved when the device's memory is exhausted, for the rest of this process's life.
        self._micro_batch = self.config.micro_batch
        self._seconds: dict[str, float] = defaultdict(float)
        self._reported: list[RewardOutput] = []
        # What the reward has seen in the optimizer step that is under way, and learns from when it is over.
        self._collected: list[Any] = []
        # Whether the first process scores everyone's samples: for training, and for the monitor.
        self._first_scores = self._first_measures = False
        self._gate_cost = (0, 0)
        # Samples per pipeline call when the trajectory at hand was begun: the sampler may shrink on the way.
        self._drawn_at = self.sampler.batch_size
        if self.out is not None:
            self.processes.together(self._open, resume)
            self._require_one_run()

    def _build_monitor(self, monitor: Monitor | MonitorConfig | Sequence[Any] | None) -> Monitor | None:
        if monitor is None:
            return None
        if not isinstance(monitor, Monitor):
            config = monitor if isinstance(monitor, MonitorConfig) else MonitorConfig(rewards=list(monitor))
            monitor = Monitor(config, "cpu" if self._idle_rewards else self.accelerator.device)
        if self._labelled is not None:
            raise UserError("monitor: an algorithm that learns from labelled pictures draws no samples to be watched")
        return monitor

    # -- the loop ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Metrics]:
        """Run the remaining epochs, yielding one record after each."""
        try:
            with self.processes.signals():
                if self.epoch == 0:
                    self._write_samples()
            while self.epoch < self.config.epochs:
                if self.monitor is not None and self.monitor.alarm:
                    raise MonitorAlarm(self.monitor.alarm)
                with self.processes.signals():
                    self._boundary = self.state_dict()
                    try:
                        metrics = self._run_epoch(self.epoch + 1)
                    finally:
                        self._drop_scoring()
                    self._boundary = None
                yield from self._hand_out(metrics)
        except KeyboardInterrupt:
            # Half an epoch cannot be resumed to the bit; its beginning can. Between two epochs the state is one.
            if self.out is not None:
                self._save_checkpoint(self.state_dict() if self._boundary is None else self._boundary)
            raise

    def _hand_out(self, metrics: Metrics) -> Iterator[Metrics]:
        """Yield the record; an interruption of one process in its caller's hands becomes one of all."""
        try:
            yield metrics
        except KeyboardInterrupt:
            if self.processes.count == 1:
                raise
            self.processes.interrupt()
        self.processes.together(lambda: None)

    def _run_epoch(self, epoch: int) -> Metrics:
        # The checkpoint is written after the epoch's record, so its time stands in the next one.
        saving = self._seconds.get("save")
        self._seconds.clear()
        if saving is not None:
            self._seconds["save"] = saving
        before, self._gate_cost = self._cost(), (0, 0)
        started = time.perf_counter()
        samples = self._plan(epoch)
        self._reported.clear()
        self._collected.clear()
        self._first_scores = self._need_everyone([self.reward])
        self._first_measures = self.monitor is not None and self._need_everyone(self.monitor.rewards.values())
        trajectory: Trajectory | None = None
        scores: RewardOutput | None = None
        prepared = Prepared({})
        if self.algorithm.evidence != "gradient":
            trajectory = self.processes.in_step(self._draw, samples)
            groups = samples.groups
            if self._labelled is None:
                scores = self._score(trajectory, samples)
            else:
                scores, groups = self._labelled.scores(samples.metadata), self._labelled.groups(len(samples))
            if self.parity is None:
                self.processes.in_step(self._pass_gate, trajectory)
            prepared = self.processes.together(self.algorithm.prepare, groups, scores)
        values = self._update(samples, trajectory, prepared)
        self.algorithm.after_epoch(self.policy, self.step)
        self.epoch = epoch
        if scores is None:
            scores = self._gathered(_joined(self._reported))
        if scores is not None:
            values = {**_reward_values(scores, prepared), **values}
        took = time.perf_counter() - started
        values["samples_per_second"] = len(samples) / took
        # Every process passes the gate once, resumed or not: its calls are not the epoch's.
        spent = [now - then - gate for now, then, gate in zip(self._cost(), before, self._gate_cost, strict=True)]
        calls, rows = (sum(of_all) for of_all in zip(*self.processes.gather(spent), strict=True))
        values |= {"denoiser_calls": float(calls), "denoiser_rows": float(rows)}
        if self.monitor is not None:
            values |= self._watch(self.monitor, samples, trajectory, scores, values.get("kl"))
        return self._finish(epoch, values)

    def _watch(
        self,
        monitor: Monitor,
        samples: _Samples,
        trajectory: Trajectory | None,
        scores: RewardOutput | None,
        kl: float | None,
    ) -> dict[str, float]:
        """Let the monitor see the epoch's samples, and return its values."""
        if self.algorithm.evidence == "gradient":
            # The update decodes and scores its samples piece by piece; others of the same noise are looked at.
            trajectory = self.processes.in_step(self._draw, samples)
            kept = copy.deepcopy(self.reward.state_dict())
            scores = self._score(trajectory, samples)
            # They are no samples of the training: a reward that learns must not have seen them.
            self.reward.load_state_dict(kept)
        assert scores is not None
        with self._phase("monitor"):
            images, rows = self._to_be_scored(trajectory, samples, self._first_measures)
            mine = self.processes.together(self._measure, monitor, images, rows, samples)
            if self._first_measures:
                self._share_states(monitor.rewards.values())
            found = [part for part in self.processes.gather(mine) if part is not None]
            measured = {name: torch.cat([part[name] for part in found]) for name in found[0]}
            return monitor.record(samples.epoch, scores.total, samples.groups, measured, kl)

    def _measure(
        self, monitor: Monitor, images: Tensor | None, rows: Sequence[int], samples: _Samples
    ) -> dict[str, Tensor] | None:
        if images is None:
            return None
        texts, metadata = [samples.texts[i] for i in rows], [samples.metadata[i] for i in rows]
        with brought(monitor.rewards.values(), self.accelerator.device, self._idle_rewards):
            return monitor.measure(images, texts, metadata)

    def _finish(self, epoch: int, values: dict[str, float]) -> Metrics:
        """Write what is due after an epoch: samples, the log line, then the checkpoint."""
        last = epoch == self.config.epochs
        every = self.config.sample_every
        if every and (epoch % every == 0 or last):
            self._write_samples()
        metrics = Metrics(epoch, self.step, values, dict(self._seconds))
        self.processes.together(self._log, metrics)
        if self.out is not None and (epoch % self.config.save_every == 0 or last):
            self._save_checkpoint(self.state_dict())
        return metrics

    def _log(self, metrics: Metrics) -> None:
        if self.out is not None and self.processes.first:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics.record()) + "\n")

    def _plan(self, epoch: int) -> _Samples:
        """Return the epoch's samples: a pure function of (seed, epoch) and the number of processes."""
        drawn = self._stream.epoch(epoch - 1, self.config.prompts_per_epoch)
        rows = [prompt for prompt in drawn for _ in range(self.config.samples_per_prompt)]
        texts = [row.text for row in rows]
        keys = list(sample_keys(texts, self.config.seed, epoch))
        shares = even_shares(len(rows), self.processes.count)
        metadata = metadata_of(rows)
        groups = told_apart(texts, metadata)
        return _Samples(epoch, texts, metadata, keys, groups, conditions_of(rows), shares)

    def _draw(self, samples: _Samples) -> Trajectory | None:
        """Draw this process's share; ``None`` if that is empty, since there are more processes than samples."""
        mine = samples.shares[self.processes.rank]
        if not mine:
            return None
        with self.policy.adapter(self.algorithm.behaviour):
            if self._labelled is not None:
                with self._phase("rollout"):
                    return self._labelled.trajectory(mine, samples.texts, samples.keys, samples.metadata)
            trajectory = self._rollout(samples, mine)
            if self.processes.sharded:
                # The weights come together only if all call: a shorter share ends with calls that nobody looks at.
                calls = [math.ceil(len(share) / self.sampler.batch_size) for share in samples.shares]
                for _ in range(max(calls) - calls[self.processes.rank]):
                    texts, keys, conditions = samples.texts[:1], samples.keys[:1], samples.conditions_at([0])
                    self.sampler.rollout(texts, keys=keys, conditions=conditions, decode=False)
            return trajectory

    def _rollout(self, samples: _Samples, mine: Sequence[int]) -> Trajectory:
        parts = []
        size = self._drawn_at = self.sampler.batch_size
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            texts, keys = [samples.texts[i] for i in rows], [samples.keys[i] for i in rows]
            with self._phase("rollout"):
                parts.append(self.sampler.rollout(texts, keys=keys, conditions=samples.conditions_at(rows)))
                self._tell("rollout", start + len(rows), len(mine))
            with self._phase("score"):
                self._begin_scoring(parts[-1], [samples.metadata[i] for i in rows])
        with self._phase("rollout"):
            return Trajectory.cat(parts)

    def _begin_scoring(self, part: Trajectory, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Let scorers that work elsewhere begin, while the next samples are drawn here."""
        assert part.images is not None
        # What must see all samples is called by the first process alone.
        if not self._first_scores:
            self.reward.begin(part.images, part.prompts, metadata)
        if self.monitor is not None and not self._first_measures:
            self.monitor.begin(part.images, part.prompts, metadata)

    def _drop_scoring(self) -> None:
        self.reward.drop()
        if self.monitor is not None:
            self.monitor.drop()

    def _score(self, trajectory: Trajectory | None, samples: _Samples) -> RewardOutput:
        """Score the epoch's samples, and return everyone's scores, in the plan's order, on the CPU."""
        with self._phase("score"):
            images, rows = self._to_be_scored(trajectory, samples, self._first_scores)
            out = self._gathered(self.processes.together(self._score_rows, images, rows, samples))
            if self._first_scores:
                self._share_states([self.reward])
            assert out is not None
            return out

    def _need_everyone(self, rewards: Iterable[Reward]) -> bool:
        """Say whether the first process must do all the work of these scorers.

        Those that compare samples must see all of a prompt's; those that keep a state must see them all in the same
        order as one process would, or each process would go by statistics of its own.
        """
        mine = any(reward.groupwise or reward.state_dict() for reward in rewards)
        return self.processes.count > 1 and any(self.processes.gather(mine))

    def _to_be_scored(
        self, trajectory: Trajectory | None, samples: _Samples, by_first: bool
    ) -> tuple[Tensor | None, Sequence[int]]:
        """Return the images that this process scores, ``None`` if there are none, and which samples they are."""
        images = None if trajectory is None else trajectory.images
        if not by_first:
            return images, samples.shares[self.processes.rank]
        everyone = self.processes.gather(None if images is None else images.cpu())
        if not self.processes.first:
            return None, []
        whole = torch.cat([part for part in everyone if part is not None])
        return whole.to(self.policy.device), range(len(samples))

    def _share_states(self, rewards: Iterable[Reward]) -> None:
        """Give every process the states that the scorers of the first one have come to."""
        for reward in rewards:
            state = self.processes.gather(reward.state_dict())[0]
            if not self.processes.first:
                reward.load_state_dict(state)

    def _score_rows(self, images: Tensor | None, rows: Sequence[int], samples: _Samples) -> RewardOutput | None:
        if images is None:
            return None
        texts = [samples.texts[i] for i in rows]
        with brought([self.reward], self.accelerator.device, self._idle_rewards):
            out = self.reward(images, texts, [samples.metadata[i] for i in rows])
        self._tell("score", len(texts), len(texts))
        return out

    def _gathered(self, scores: RewardOutput | None) -> RewardOutput | None:
        """Return the scores of all processes, by rank, on the CPU; ``None`` if no process has any."""
        mine = None if scores is None else _on_cpu(scores)
        return _joined([part for part in self.processes.gather(mine) if part is not None])

    def _pass_gate(self, trajectory: Trajectory | None) -> None:
        before = self._cost()
        with self.policy.adapter(self.algorithm.behaviour):
            if trajectory is not None and self._labelled is not None:
                # Pictures that the policy did not draw have no log-probs to come back to: a rollout of its own has.
                self._drawn_at = self.sampler.batch_size
                trajectory = self._redrawn(trajectory, min(len(trajectory), self._drawn_at))
            self.parity = {} if trajectory is None else self._gate(trajectory)
        calls, rows = (now - then for now, then in zip(self._cost(), before, strict=True))
        self._gate_cost = (calls, rows)

    def _cost(self) -> tuple[int, int]:
        """Return the denoiser's passes so far, and their rows."""
        return self.sampler.denoiser_calls, self.sampler.denoiser_rows

    def _gate(self, trajectory: Trajectory) -> dict[str, float]:
        with self._phase("gate"):
            if not trajectory.stochastic_steps:
                return {}
            size, micro = min(len(trajectory), self.sampler.batch_size), min(len(trajectory), self.config.micro_batch)
            figures = self._halving(self._parity_at, size, trajectory)
            error = self._halving(self._micro_batch_error, micro, trajectory)
            return {**figures, "micro_batch_ratio_error": error}

    def _halving(self, measure: Callable[[Trajectory, int], T], size: int, trajectory: Trajectory) -> T:
        """Return ``measure(trajectory, size)`` of the gate, with fewer samples if memory does not hold them."""

        def undo(size: int) -> str:
            self.optimizer.zero_grad(set_to_none=True)
            return f"the parity gate looks at {size} samples at once"

        smallest = size if self.processes.sharded else 1
        return halving(functools.partial(measure, trajectory), size, "the parity gate", smallest=smallest, undo=undo)

    def _redrawn(self, trajectory: Trajectory, size: int) -> Trajectory:
        """Draw the first ``size`` samples anew, without pictures."""
        first = trajectory.select(range(size))
        return self.sampler.rollout(first.prompts, keys=first.keys, conditions=first.conditions, decode=False)

    def _parity_at(self, trajectory: Trajectory, size: int) -> dict[str, float]:
        """Return the figures for the first ``size`` samples, in one pipeline call."""
        if size == min(len(trajectory), self._drawn_at):
            return self.sampler.check_parity(trajectory.select(range(size)))
        # They were drawn in calls of another size, where kernels round differently.
        fresh = self._redrawn(trajectory, size)
        if self.sampler.batch_size < size:
            return self._parity_at(trajectory, self.sampler.batch_size)
        return self.sampler.check_parity(fresh)

    def _micro_batch_error(self, trajectory: Trajectory, size: int) -> float:
        """Return max |ratio - 1| over shuffled samples in a micro-batch, which is what the updates replay.

        Kernels round differently at other batch sizes, so this is not exactly 0; it must stay well below a clip range.
        """
        order = torch.randperm(len(trajectory), generator=self._generator(0, 0, "gate"))
        errors: list[float] = []

        def measure(view: StepView) -> None:
            errors.append(float(((view.log_prob - view.old_log_prob).exp() - 1).abs().max()))

        self.sampler.replay(trajectory.select(order[:size]), measure, grad=False)
        if max(errors) > MICRO_BATCH_BOUND:
            warnings.warn(
                f"parity: |ratio - 1| is {max(errors):.2g} in micro-batches of {size}, above "
                f"{MICRO_BATCH_BOUND:g}; set train.micro_batch to sampler.batch_size, or model.dtype to fp32",
                stacklevel=2,
            )
        return max(errors)

    def _update(self, samples: _Samples, trajectory: Trajectory | None, prepared: Prepared) -> dict[str, float]:
        units = [[i] for i in range(len(samples))] if prepared.units is None else [list(u) for u in prepared.units]
        meter: dict[str, list[tuple[float, float]]] = defaultdict(list)
        done, total = 0, self.algorithm.config.inner_epochs * self.config.updates_per_epoch
        with self._phase("update"):
            evidence = self._bring_together(units, samples, trajectory)
            for sweep in range(self.algorithm.config.inner_epochs):
                order = torch.randperm(len(units), generator=self._generator(samples.epoch, sweep, "order")).tolist()
                for number, chosen in enumerate(_split(order, self.config.updates_per_epoch)):
                    minibatch = [units[i] for i in chosen]
                    stream = (samples.epoch, sweep, f"minibatch{number}")
                    found = self.processes.in_step(self._accumulate, minibatch, stream, samples, evidence, prepared)
                    for name, values in found.items():
                        meter[name].extend(values)
                    meter["grad_norm"].append((self._optimize(), 1.0))
                    self._settle()
                    done += 1
                    self.processes.together(self._tell, "update", done, total)
        return self._means(meter)

    def _bring_together(
        self, units: Sequence[list[int]], samples: _Samples, trajectory: Trajectory | None
    ) -> _Evidence:
        """Return this process's samples, with those of its units that others have drawn (a pair across processes)."""
        drawn = {i: rank for rank, share in enumerate(samples.shares) for i in share}
        # A unit is trained where its first sample was drawn.
        owner = {unit[0]: drawn[unit[0]] for unit in units}
        spare = units[0] if units and self.processes.sharded else []
        if self.algorithm.evidence == "gradient":
            return _Evidence(owner, spare)
        mine = samples.shares[self.processes.rank]
        moving = {i for unit in units for i in unit if drawn[i] != owner[unit[0]]} | set(spare)
        parts, rows = [] if trajectory is None else [trajectory], list(mine)
        if moving:
            leaving = [i for i in mine if i in moving]
            given = None
            if leaving:
                assert trajectory is not None
                given = _moved(trajectory.select([mine.index(i) for i in leaving]), "cpu")
            for theirs, part in self.processes.gather((leaving, given)):
                if part is not None and theirs != leaving:
                    parts.append(_moved(part, self.policy.device if self.sampler.store == "device" else "cpu"))
                    rows.extend(theirs)
        place = {index: row for row, index in enumerate(rows)}
        return _Evidence(owner, spare, Trajectory.cat(parts) if parts else None, place)

    def _accumulate(
        self,
        minibatch: Sequence[list[int]],
        stream: tuple[int, int, str],
        samples: _Samples,
        evidence: _Evidence,
        prepared: Prepared,
    ) -> dict[str, list[tuple[float, float]]]:
        """Add up the gradients of this process's units of the minibatch, in micro-batches that fit into memory.

        Returns metrics by name, as (value, samples) of each micro-batch.

        Raises:
            UserError: the device's memory does not hold the smallest micro-batch.
        """
        units = [unit for unit in minibatch if evidence.owner[unit[0]] == self.processes.rank]
        # What a pass over a part of the minibatch has changed is taken back before it is begun again.
        kept = copy.deepcopy((self.algorithm.state_dict(), self.reward.state_dict()))
        reported, cost = len(self._reported), self._cost()
        largest, everything = max(map(len, units), default=1), max(sum(map(len, units)), 1)

        def undo(size: int) -> str:
            self.optimizer.zero_grad(set_to_none=True)
            self.algorithm.load_state_dict(copy.deepcopy(kept[0]))
            self.reward.load_state_dict(copy.deepcopy(kept[1]))
            self._collected.clear()
            del self._reported[reported:]
            self.sampler.uncount(*cost)
            self._micro_batch = size
            return (
                f"train.micro_batch is {size} from here on, and the gradients stay the same; write that into the "
                "configuration to save the failed attempt"
            )

        def attempt(size: int) -> dict[str, list[tuple[float, float]]]:
            # Not by `size`, which counts this process's samples only: all processes cut the minibatch alike.
            return self._accumulate_in(self._micro_batch, minibatch, stream, samples, evidence, prepared)

        size = min(self._micro_batch, everything)
        smallest = size if self.processes.sharded else largest
        return halving(attempt, size, "a micro-batch", smallest=smallest, undo=undo)

    def _accumulate_in(
        self,
        micro_batch: int,
        minibatch: Sequence[list[int]],
        stream: tuple[int, int, str],
        samples: _Samples,
        evidence: _Evidence,
        prepared: Prepared,
    ) -> dict[str, list[tuple[float, float]]]:
        """Do that in micro-batches of ``micro_batch`` samples at most, or of one unit."""
        size = sum(map(len, minibatch))
        shares: list[list[list[list[int]]]] = []
        for rank in range(self.processes.count):
            units = [unit for unit in minibatch if evidence.owner[unit[0]] == rank]
            shares.append(list(_micro_batches(units, micro_batch)))
        own = shares[self.processes.rank]
        meter: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for micro in own:
            rows = sum(map(len, micro))
            for name, value in self._backward(micro, rows / size, stream, samples, evidence, prepared).items():
                meter[name].append((value, rows))
        if self.processes.sharded:
            # The weights come together only if all call: a shorter share ends with gradients of weight 0.
            for _ in range(max(map(len, shares)) - len(own)):
                self._backward([evidence.spare], 0.0, stream, samples, evidence, prepared)
        return meter

    def _backward(
        self,
        units: Sequence[list[int]],
        weight: float,
        stream: tuple[int, int, str],
        samples: _Samples,
        evidence: _Evidence,
        prepared: Prepared,
    ) -> dict[str, float]:
        """Add the gradient of one micro-batch, whose share of the minibatch is ``weight``; return its metrics."""
        rows = [i for unit in units for i in unit]
        batch = Batch(
            prompts=tuple(samples.texts[i] for i in rows),
            keys=tuple(samples.keys[i] for i in rows),
            values={name: value[rows] for name, value in prepared.values.items()},
            trajectory=evidence.select(rows),
            conditions=samples.conditions_at(rows),
            metadata=[samples.metadata[i] for i in rows],
            units=_renumbered(units),
        )
        context = Context(
            sampler=self.sampler,
            policy=self.policy,
            reward=self.reward,
            weight=weight,
            # Keyed by the minibatch: how it is cut into micro-batches must not change the result.
            generator=self._generator(*stream),
            epoch=samples.epoch,
            step=self.step,
            report=self._report if weight else lambda rewards: None,
        )
        metrics = self.algorithm.accumulate(batch, context)
        found = self.reward.collect()
        # Calls that do not count teach nothing, nor do samples that have been scored before they are trained on.
        if found is not None and weight and self.algorithm.evidence == "gradient":
            self._collected.append(found)
        return metrics

    def _report(self, rewards: RewardOutput) -> None:
        self._reported.append(_on_cpu(rewards))

    def _settle(self) -> None:
        """Let the reward learn from an optimizer step, once it is over, what it has seen of it in all processes."""
        if self.algorithm.evidence == "gradient":
            self.reward.settle([found for own in self.processes.gather(self._collected) for found in own])
            self._collected.clear()

    def _generator(self, epoch: int, sweep: int, stream: str) -> torch.Generator:
        return keyed_generator(SampleKey(self.config.seed, epoch, "", sweep), stream)

    def _optimize(self) -> float:
        """Reduce, check, clip and step; return the gradient's norm before clipping."""
        parameters = self.policy.named_parameters()
        self.processes.sum_gradients(list(parameters.values()))
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.algorithm.config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            bad = [n for n, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"the gradient of {bad[0] if bad else 'the policy'} is not finite; the weights are unchanged and the "
                "last checkpoint is intact: lower algorithm.lr, or use model.dtype fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.algorithm.after_step(self.policy, self.step)
        return float(norm)

    def _means(self, meter: Mapping[str, list[tuple[float, float]]]) -> dict[str, float]:
        merged: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for found in self.processes.gather(dict(meter)):
            for name, entries in found.items():
                merged[name].extend(entries)
        return {name: sum(v * w for v, w in e) / sum(w for _, w in e) for name, e in merged.items() if e}

    # -- what a run leaves behind --------------------------------------------------------------------------------

    def _write_samples(self) -> None:
        """Draw the sample grid: the same prompts and noise every time."""
        if self.out is not None and self.config.sample_every:
            self.processes.in_step(self._draw_samples, self.out)

    def _draw_samples(self, out: Path) -> None:
        # A sharded model draws with all processes or not at all.
        if not (self.processes.first or self.processes.sharded):
            return
        count = self.config.sample_count
        prompts = [self.sample_prompts[i % len(self.sample_prompts)] for i in range(count)]
        texts = [prompt.text for prompt in prompts]
        with self._phase("samples"):
            trajectory = self.sampler.rollout(
                texts, keys=sample_keys(texts, self.config.seed, 0), conditions=conditions_of(prompts)
            )
            assert trajectory.images is not None
            images = trajectory.images if trajectory.images.ndim == 4 else trajectory.images[:, 0]
            if self.processes.first:
                path = out / "samples" / f"epoch_{self.epoch:04d}.png"
                path.parent.mkdir(exist_ok=True)
                sample_grid(images.cpu(), columns=min(count, 8), captions=texts, path=path)

    def save(self) -> list[Path]:
        """Write the adapter (or the trained weights, with ``lora=None``) and the report; return the files."""
        if self.out is None:
            raise UserError("Trainer.save: this trainer has no folder; give it out=...")
        return self.processes.together(self._save)

    def _save(self) -> list[Path]:
        assert self.out is not None
        if not self.processes.first:
            return []
        folder = self.out / "adapter"
        about: dict[str, Any] = {
            "config": self.description,
            "metadata": {
                "difftune.rewards": self.reward.name,
                "difftune.algorithm": self.algorithm.name,
                "difftune.epoch": str(self.epoch),
            },
            "base_model": self.base_model,
            "name": self.out.name or "adapter",
        }
        if self.policy.lora is None:
            files = save_weights(self.policy.pipe, folder, names=list(self.policy.named_parameters()), **about)
        else:
            files = save_adapter(self.policy.pipe, self.policy.adapter_name, folder, **about)
        return [*files, write_report(self.out)]

    @property
    def checkpoint_root(self) -> Path:
        """The folder of the checkpoints."""
        assert self.out is not None
        return self.out / "checkpoints"

    def _save_checkpoint(self, state: Mapping[str, Any]) -> None:
        def write() -> None:
            if self.processes.first:
                keep = self.config.keep_checkpoints
                checkpoint.save_checkpoint(self.checkpoint_root, state["epoch"], state, keep=keep)

        with self._phase("save"):
            self.processes.together(write)

    def _open(self, resume: bool) -> None:
        """Make the run's folder, or take up the run that is in it."""
        assert self.out is not None
        log = self.out / "metrics.jsonl"
        if resume:
            found = checkpoint.load_latest(self.checkpoint_root)
            if found is not None:
                self.load_state_dict(found[0])
            elif not self.out.is_dir():
                raise UserError(f"resume: {self.out} does not exist; start the run without --resume")
        elif log.exists() or checkpoint.checkpoints(self.checkpoint_root):
            raise UserError(f"out: {self.out} already holds a run; resume it (resume=True), or choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        if self.processes.first and log.exists():
            # Lines of epochs that the checkpoint does not know of are written again, the same.
            kept = [line for line in log.read_text().splitlines() if _epoch_of(line) <= self.epoch]
            checkpoint.write_atomically(log, "".join(line + "\n" for line in kept))

    def _require_one_run(self) -> None:
        """Refuse processes that found different checkpoints: each would go on from its own."""
        epochs = self.processes.gather(self.epoch)
        if len(set(epochs)) > 1:
            other = next(rank for rank, epoch in enumerate(epochs) if epoch != epochs[0])
            raise UserError(
                f"resume: process 0 found epoch {epochs[0]} in {self.out}, process {other} found {epochs[other]}; put "
                "the run into a folder that all processes share"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything the run is: counters, weights, adapters, optimizer, algorithm and random generators.

        All processes must call it: what each has of its own (generators) is gathered.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seed": self.config.seed,
            "policy": self.policy.state_dict(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "algorithm": {"name": self.algorithm.name, "state": copy.deepcopy(self.algorithm.state_dict())},
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "processes": self.processes.gather(
                {"reward": copy.deepcopy(self.reward.state_dict()), "rng": checkpoint.rng_state()}
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            UserError: the state is of another algorithm, seed or adapter, or was left by processes whose rewards each
                had a memory of their own.
        """
        if state["algorithm"]["name"] != self.algorithm.name:
            raise UserError(
                f"resume: the checkpoint was made by {state['algorithm']['name']!r}, this run uses "
                f"{self.algorithm.name!r}; resume with the run's own configuration"
            )
        if state["seed"] != self.config.seed:
            raise UserError(
                f"resume: the checkpoint has seed {state['seed']}, this run {self.config.seed}; use the same seed"
            )
        own, count = state["processes"], self.processes.count
        if len(own) != count:
            if any(process["reward"] != own[0]["reward"] for process in own):
                raise UserError(
                    f"resume: reward {self.reward.name!r} has another memory in each of {len(own)} processes, this run "
                    f"has {count}; resume with {len(own)}"
                )
            warnings.warn(
                f"resume: the checkpoint was made by {len(own)} processes, this run has {count}; it goes on as the "
                "other would have up to rounding, not to the bit",
                stacklevel=2,
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"]["state"])
        if self.monitor is not None and state.get("monitor") is not None:
            self.monitor.load_state_dict(state["monitor"])
        mine = own[self.processes.rank % len(own)]
        self.reward.load_state_dict(mine["reward"])
        checkpoint.load_rng_state(mine["rng"])

    # -- small things --------------------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def _tell(self, phase: str, done: int, total: int) -> None:
        if self.listener is not None:
            self.listener(phase, done, total)


@dataclass(frozen=True)
class _Evidence:
    """What a process trains on in an epoch.

    Attributes:
        owner: a unit's first sample to the process that trains the unit.
        spare: a unit that every process has, for calls that must be made and do not count; empty if there are none.
        trajectory: the recorded samples; ``None`` for ``gradient`` evidence, and where there are none.
        place: a sample's index in the epoch to its row in the trajectory.
    """

    owner: Mapping[int, int]
    spare: list[int]
    trajectory: Trajectory | None = None
    place: Mapping[int, int] = field(default_factory=dict)

    def select(self, indices: Sequence[int]) -> Trajectory | None:
        """Return the samples of these indices."""
        return None if self.trajectory is None else self.trajectory.select([self.place[i] for i in indices])


def _moved(trajectory: Trajectory, device: torch.device | str) -> Trajectory:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    fields = {field.name: move(getattr(trajectory, field.name)) for field in dataclasses.fields(trajectory)}
    conditions = {name: move(value) for name, value in trajectory.conditions.items()}
    return Trajectory(**{**fields, "conditions": conditions})


def _joined(outputs: Sequence[RewardOutput]) -> RewardOutput | None:
    """Join the rewards of several batches; ``None`` if there is none."""
    if not outputs:
        return None
    parts = {name: torch.cat([o.parts[name] for o in outputs]) for name in outputs[0].parts}
    known = [o.uncertainty for o in outputs if o.uncertainty is not None]
    uncertainty = torch.cat(known) if len(known) == len(outputs) else None
    return RewardOutput(torch.cat([o.total for o in outputs]), parts, uncertainty)


def _on_cpu(rewards: RewardOutput) -> RewardOutput:
    parts = {name: part.detach().cpu() for name, part in rewards.parts.items()}
    uncertainty = None if rewards.uncertainty is None else rewards.uncertainty.detach().cpu()
    return RewardOutput(rewards.total.detach().cpu(), parts, uncertainty)


def _split(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Cut ``items`` into at most ``parts`` runs of nearly equal length, none empty."""
    count = min(parts, len(items))
    return [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]


def _micro_batches(units: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Cut units into runs of at most ``size`` samples (one unit at least)."""
    current: list[list[int]] = []
    for unit in units:
        if current and sum(map(len, current)) + len(unit) > size:
            yield current
            current = []
        current.append(unit)
    if current:
        yield current


def _renumbered(units: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the units as indices into their concatenation."""
    out, start = [], 0
    for unit in units:
        out.append(list(range(start, start + len(unit))))
        start += len(unit)
    return out


def _reward_values(scores: RewardOutput, prepared: Prepared) -> dict[str, float]:
    values = {"reward/mean": float(scores.total.mean()), "reward/std": float(scores.total.std(correction=0))}
    for name, part in scores.parts.items():
        values[f"reward/{name}"] = float(part.mean())
    if "advantage" in prepared.values:
        values["advantage/abs_mean"] = float(prepared.values["advantage"].abs().mean())
    return values


def _epoch_of(line: str) -> float:
    """Return a log line's epoch; a torn line has none and is dropped."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


__all__ = ["Listener", "Prompt", "Trainer", "TrainerConfig"]
