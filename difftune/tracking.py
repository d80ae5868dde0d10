"""What a run tells while and after it runs: progress on the terminal, and held-out figures of the saved file.

:class:`Progress` shows epochs as they finish, live on a terminal and as plain lines elsewhere. :func:`draw` and
:class:`Comparison` are the evaluation: the stock pipeline with its own scheduler, noise that training never saw, the
base beside the tuned model on the same noise.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difftune.prompts import Prompt, conditions_of, metadata_of
from difftune.quirks import quirk_of
from difftune.reward import Reward
from difftune.sampler import as_argument, keyed_generator, sample_keys, to_images
from difftune.types import Metrics, RewardOutput, SampleKey, UserError

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return the last ``width`` values as a row of bars, lowest to highest."""
    shown = [value for value in values[-width:] if math.isfinite(value)]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] if span else _BARS[0] for value in shown)


def clock(seconds: float) -> str:
    """Return a duration as ``m:ss`` or ``h:mm:ss``."""
    whole = round(max(seconds, 0))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Eta:
    """The time a run still takes, from the epochs that are finished.

    Sample grids come at intervals and the gate comes once. They are taken out of the epochs they fell into, and the
    grids that are still due are added by themselves: none is counted twice.

    Args:
        epochs: epochs of the run.
        sample_every: epochs between sample grids; 0 for none.
    """

    def __init__(self, epochs: int, sample_every: int) -> None:
        self._epochs = epochs
        self._every = sample_every
        self._bare: list[float] = []
        self._grids: list[float] = []

    def add(self, metrics: Metrics, took: float) -> None:
        """Count an epoch that took ``took`` seconds of wall clock, all phases included."""
        grid = metrics.seconds.get("samples", 0.0)
        if grid:
            self._grids.append(grid)
        self._bare.append(max(took - grid - metrics.seconds.get("gate", 0.0), 0.0))

    def left(self, epoch: int) -> float | None:
        """Return the seconds left after ``epoch``, ``None`` as long as no epoch is finished."""
        if not self._bare:
            return None
        recent = self._bare[-10:]
        epochs = (self._epochs - epoch) * sum(recent) / len(recent)
        if not self._every or not self._grids:
            return epochs
        due = [e for e in range(epoch + 1, self._epochs + 1) if e % self._every == 0 or e == self._epochs]
        return epochs + len(due) * sum(self._grids) / len(self._grids)


class Progress:
    """Shows a run as plain lines, one an epoch; :class:`LiveProgress` is its like for terminals.

    Args:
        epochs: epochs of the run.
        sample_every: epochs between sample grids.
        start: epochs finished already.
        write: where lines go.
    """

    def __init__(self, epochs: int, sample_every: int, start: int, write: Callable[[str], None]) -> None:
        self.epochs = epochs
        self.epoch = start
        self.eta = Eta(epochs, sample_every)
        self.rewards: list[float] = []
        self.write = write
        self._since = time.perf_counter()
        self._rate = 0.0

    def __enter__(self) -> Progress:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def phase(self, name: str, done: int, total: int) -> None:
        """Take note of where within an epoch the run is."""

    def begin(self) -> None:
        """Start the clock of an epoch."""
        self._since = time.perf_counter()

    def finished(self, metrics: Metrics) -> None:
        """Show a finished epoch."""
        now = time.perf_counter()
        self.eta.add(metrics, now - self._since)
        self._since = now
        self.epoch = metrics.epoch
        self._rate = metrics.values.get("samples_per_second", 0.0)
        if "reward/mean" in metrics.values:
            self.rewards.append(metrics.values["reward/mean"])
        self.write(self.line(metrics))

    def line(self, metrics: Metrics) -> str:
        """Return an epoch as one line."""
        values = metrics.values
        parts = [f"epoch {metrics.epoch}/{self.epochs}"]
        if "reward/mean" in values:
            parts.append(f"reward {values['reward/mean']:.4g} ± {values.get('reward/std', 0.0):.2g}")
        for name, label in (("loss", "loss"), ("clip_fraction", "clipped"), ("kl", "kl"), ("grad_norm", "grad")):
            if name in values:
                parts.append(f"{label} {values[name]:.3g}")
        parts.append(f"{self._rate:.3g} samples/s")
        left = self.eta.left(metrics.epoch)
        if left is not None and metrics.epoch < self.epochs:
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)


class LiveProgress(Progress):
    """The same on a terminal: one panel of three lines that stays in place."""

    def __init__(self, epochs: int, sample_every: int, start: int, console: Any) -> None:
        super().__init__(epochs, sample_every, start, lambda line: None)
        from rich.live import Live

        self._phase = ("starting", 0, 0)
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        super().__enter__()
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def phase(self, name: str, done: int, total: int) -> None:
        """Show where within an epoch the run is."""
        self._phase = (name, done, total)

    def _panel(self) -> Any:
        from rich.text import Text

        name, done, total = self._phase
        left = self.eta.left(self.epoch)
        width = 30
        filled = round(width * self.epoch / self.epochs)
        rows = [
            f"epoch  {min(self.epoch + 1, self.epochs)}/{self.epochs}  {'━' * filled}{'─' * (width - filled)}  "
            f"{'' if left is None else clock(left) + ' left'}",
            f"phase  {name} {done}/{total}" if total else f"phase  {name}",
        ]
        if self.rewards:
            first, last = self.rewards[0], self.rewards[-1]
            bars = sparkline(self.rewards)
            rows.append(f"reward {last:.4g} (began at {first:.4g})  {bars}  {self._rate:.3g} samples/s")
        return Text("\n".join(rows))


# -- evaluation ------------------------------------------------------------------------------------------------------


def draw(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    call: Mapping[str, Any] | None = None,
    conditions: Mapping[str, Sequence[Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one picture per prompt with a stock pipeline: its own call, its own scheduler.

    A picture's noise depends on the seed, the prompt and its repetition only, in a stream that training never uses: the
    same arguments give base and tuned model the same noise, at any batch size.

    Args:
        pipe: the pipeline, with or without an adapter.
        prompts: ``B`` prompts.
        seed: of the noise.
        steps, guidance_scale: the pipeline's own defaults if ``None``.
        batch_size: pictures per call.
        call: further arguments of the call, the same for every picture.
        conditions: further arguments, one value per picture (:func:`~difftune.prompts.conditions_of`).
        progress: called with (done, total).

    Returns:
        Images ``(B, 3, H, W)``, or frames ``(B, F, 3, H, W)``, in [0, 1], fp32, on the CPU.

    Raises:
        UserError: the pipeline does not take the arguments.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    known = {name: value for name, value in wanted.items() if value is not None and name in accepted}
    fixed = {**getattr(pipe, "difftune_call", {}), **known, **(call or {})}
    conditions = conditions or {}
    for name in conditions:
        if name not in accepted and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            arguments = ", ".join(argument for argument in accepted if argument != "self")
            raise UserError(f"prompts: {type(pipe).__name__} takes no {name!r}; its arguments are {arguments}")
    keys = sample_keys(prompts, seed, 0)
    size = min(batch_size, quirk_of(type(pipe).__name__).max_batch or batch_size)
    parts = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        given = {name: as_argument(pipe, name, list(values[rows]), accepted) for name, values in conditions.items()}
        single = {**fixed, **given}
        if isinstance(single.get("negative_prompt"), str):
            # Pipelines refuse one negative prompt beside a list of prompts.
            single["negative_prompt"] = [single["negative_prompt"]] * len(prompts[rows])
        per_picture = [name for name in (*given, "negative_prompt") if isinstance(single.get(name), list)]
        listed = {"prompt": list(prompts[rows]), **{name: single.pop(name) for name in dict.fromkeys(per_picture)}}
        parts.append(_drawn(pipe, listed, single, keys[rows], "generator" in accepted))
        if progress is not None:
            progress(min(start + size, len(prompts)), len(prompts))
    return torch.cat(parts)


def _drawn(
    pipe: Any, listed: Mapping[str, list[Any]], single: Mapping[str, Any], keys: Sequence[SampleKey], takes_noise: bool
) -> Tensor:
    """Call the pipeline with lists of a value per picture, or picture by picture if it does not take lists."""

    def call(arguments: Mapping[str, Any], generator: Any, count: int) -> Tensor:
        noise = {"generator": generator} if takes_noise else {}
        with torch.no_grad():
            return to_images(pipe(**arguments, **noise, **single), count).cpu()

    def noise_of(key: SampleKey) -> torch.Generator:
        return keyed_generator(key, "evaluate")

    refusals = (TypeError, ValueError, AttributeError, AssertionError)
    try:
        return call(listed, [noise_of(key) for key in keys], len(keys))
    except refusals as refusal:
        if isinstance(refusal, UserError):
            raise
        try:
            rows = [{name: values[row] for name, values in listed.items()} for row in range(len(keys))]
            return torch.cat([call(row, noise_of(key), 1) for row, key in zip(rows, keys, strict=True)])
        except refusals:
            # Of the two refusals, the first says what is wrong with the arguments.
            reason = str(refusal).strip().splitlines()[0] if str(refusal).strip() else type(refusal).__name__
            raise UserError(
                f"{type(pipe).__name__} refused the call ({reason}); what it needs beside the text (image, mask_image, "
                "...) stands in the prompt file"
            ) from refusal


@dataclass(frozen=True)
class Comparison:
    """Base and tuned model on the same prompts and noise.

    Attributes:
        prompts: ``B`` prompts.
        base, tuned: pictures ``(B, 3, H, W)`` in [0, 1].
        base_scores, tuned_scores: their rewards.
        settings: how they were drawn.
    """

    prompts: Sequence[str]
    base: Tensor
    tuned: Tensor
    base_scores: RewardOutput
    tuned_scores: RewardOutput
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Tuned mean minus base mean, in standard deviations of the base rewards; infinite where those are equal."""
        rise = float(self.tuned_scores.total.mean() - self.base_scores.total.mean())
        spread = float(self.base_scores.total.std(correction=0))
        if spread == 0:
            return math.copysign(math.inf, rise) if rise else 0.0
        return rise / spread

    @property
    def better(self) -> float:
        """The share of pictures whose reward rose."""
        return float((self.tuned_scores.total > self.base_scores.total).float().mean())

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain data: ``before``, ``after``, the gain and the settings."""
        return {
            "before": _figures(self.base_scores),
            "after": _figures(self.tuned_scores),
            "gain_in_base_std": self.gain if math.isfinite(self.gain) else None,
            "better": self.better,
            "settings": {"samples": len(self.prompts), **self.settings},
        }


def _figures(scores: RewardOutput) -> dict[str, float]:
    figures = {"reward/mean": float(scores.total.mean()), "reward/std": float(scores.total.std(correction=0))}
    return {**figures, **{f"reward/{name}": float(part.mean()) for name, part in scores.parts.items()}}


def repeat_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return ``count`` prompts, taking them in turn."""
    return [prompts[index % len(prompts)] for index in range(count)]


def compare(
    pipe: Any,
    load: Callable[[], None],
    reward: Reward,
    prompts: Sequence[Prompt],
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **drawing: Any,
) -> Comparison:
    """Draw and score with the base model, load the adapter, draw and score again.

    Args:
        pipe: the base pipeline.
        load: puts the adapter into it.
        reward: the scorer, on the CPU or the pipeline's device.
        prompts: one per picture.
        progress: called with (``base`` or ``tuned``, done, total).
        drawing: arguments of :func:`draw`.
    """
    texts = [prompt.text for prompt in prompts]
    metadata = metadata_of(prompts)
    conditions = conditions_of(prompts)

    def run(name: str) -> tuple[Tensor, RewardOutput]:
        told = None if progress is None else lambda done, total: progress(name, done, total)
        images = draw(pipe, texts, conditions=conditions, progress=told, **drawing)
        with torch.no_grad():
            return images, reward(images, texts, metadata)

    base, base_scores = run("base")
    load()
    tuned, tuned_scores = run("tuned")
    settings = {key: value for key, value in drawing.items() if value is not None and key != "batch_size"}
    return Comparison(texts, base, tuned, base_scores, tuned_scores, settings)
