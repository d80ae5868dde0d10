"""Alarms for a reward that is being exploited: what else happens to the samples while the trained reward rises.

A policy that has found a weakness of its reward goes on improving by that reward's account and gets worse by others'
(Gao et al. 2022, arXiv 2210.10760). The monitor scores every epoch's samples with rewards that are *not* trained on,
and keeps the series: their means, brightness, saturation and sharpness (which preference models are known to favour),
how far the samples of a prompt are apart, how far their rewards are apart, and the KL where the algorithm gives one.

**The rule.** Every series is smoothed by the mean of its last ``window`` epochs, and measured in standard deviations of
single samples in the first ``window`` epochs. With k the last epoch, ``window`` or more epochs ago, at which a
monitored reward was as good as ever (less one standard error), the alarm is given at epoch e when, since k,

    the monitored reward fell by more than ``fall``,
    that is more than 4 standard errors of the difference of the two means, and
    the trained reward rose by more than ``rise``.

k is the epoch to go back to. The standard error comes from the differences of successive epochs (von Neumann 1941), so
it holds for prompts that change from epoch to epoch, and a trend does not inflate it.

**Collapse.** A second, weaker sign: the spread of the rewards within a prompt, or the distance between its samples, is
below ``collapse`` of the most it has been. A reward variance that dies is what RewardDance (Wu et al. 2025, arXiv
2509.08826) reports of hacked models; a task that is solved looks the same, so this warns and never stops.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from difftune.reward import Reward, build_reward, build_terms
from difftune.types import UserError

#: Statistics of the picture that are kept beside the monitored rewards; they give no alarm of their own.
STATISTICS = ("brightness", "saturation", "sharpness")

_ERRORS = 4.0
"""Standard errors by which a monitored reward must have fallen."""

_THUMBNAIL = 16
"""Side, in pixels, of the pictures whose distance is the diversity."""


class MonitorConfig(BaseModel):
    """Rewards that are watched and not trained on, and when to raise the alarm."""

    model_config = ConfigDict(extra="forbid")

    rewards: list[Any] = Field(min_length=1, description="Rewards, each a name or a mapping with name and settings.")
    action: Literal["warn", "stop"] = Field(
        "warn", description="When the trained reward rises and a monitored one falls: warn, or end the run."
    )
    window: int = Field(5, ge=2, description="Epochs that are averaged before anything is compared.")
    fall: float = Field(0.5, gt=0, description="Fall of a monitored reward, in standard deviations of its samples.")
    rise: float = Field(0.25, gt=0, description="Rise of the trained reward meanwhile, in standard deviations.")
    collapse: float = Field(
        0.2, ge=0, lt=1, description="Share of its most below which reward spread or diversity warns; 0: never."
    )
    kl: float | None = Field(None, gt=0, description="KL to the base model (metric kl) above which it warns.")

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"rewards": value} if isinstance(value, list) else value


class MonitorAlarm(RuntimeError):
    """The trained reward rises while a monitored one falls; the message names the epoch to go back to."""


class Monitor:
    """Watches a run: :meth:`measure` the samples of an epoch, then :meth:`record` it.

    Args:
        config: what is watched, and the rule.
        device: where the rewards score.

    Raises:
        UserError: a monitored reward cannot be built.

    Attributes:
        alarm: why the run should end; empty while it should not.
    """

    def __init__(self, config: MonitorConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.alarm = ""
        self._watched: dict[str, Reward] = {label: one.to(device) for label, _, one in build_terms(config.rewards)}
        # A statistic that is watched as a reward gives alarms as one.
        self._statistics = {name: build_reward(name) for name in STATISTICS if name not in self._watched}
        self._series: dict[str, list[float]] = {}
        self._scales: dict[str, list[float]] = {}
        self._epochs: list[int] = []
        self._warned: list[str] = []

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """The monitored rewards by label."""
        return self._watched

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Let rewards that score elsewhere begin on samples that will be measured among others."""
        for one in self._watched.values():
            one.begin(images, prompts, metadata)

    def drop(self) -> None:
        """Give up what was begun and not measured."""
        for one in self._watched.values():
            one.drop()

    @torch.no_grad()
    def measure(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Score ``B`` samples: reward or statistic to ``(B,)``, and ``thumbnail`` ``(B, 768)``, all on the CPU.

        What several processes measure is joined along B before it is recorded.
        """
        found = {**self._watched, **self._statistics}
        measured = {label: one(images, prompts, metadata).total.cpu() for label, one in found.items()}
        frames = images.float() if images.ndim == 5 else images.float()[:, None]
        small = adaptive_avg_pool2d(frames.flatten(0, 1), _THUMBNAIL).unflatten(0, frames.shape[:2]).mean(1)
        return {**measured, "thumbnail": small.flatten(1).cpu()}

    def record(
        self,
        epoch: int,
        trained: Tensor,
        prompts: Sequence[str],
        measured: Mapping[str, Tensor],
        kl: float | None = None,
    ) -> dict[str, float]:
        """Take an epoch into the series, warn where the rule says so, and return the epoch's values for the log.

        Args:
            epoch: the epoch, from 1, each once and in order.
            trained: ``(B,)`` scores of the trained reward.
            prompts: ``B`` prompts.
            measured: what :meth:`measure` returned for the same samples.
            kl: the epoch's KL to the base model, where it is known.

        Raises:
            UserError: a KL is to be watched and none is given.
        """
        if self.config.kl is not None and kl is None:
            raise UserError("monitor.kl: the algorithm gives no KL to the base model; set algorithm.kl_weight above 0")
        columns = {"trained": trained, **{name: measured[name] for name in (*self._watched, *self._statistics)}}
        values = {name: float(column.double().mean()) for name, column in columns.items()}
        extra = {
            "reward_spread": spread(trained, prompts),
            "sample_distance": distance(measured["thumbnail"], prompts),
            "kl": kl,
        }
        values |= {name: value for name, value in extra.items() if value is not None}
        for name, value in values.items():
            self._series.setdefault(name, []).append(value)
        if len(self._epochs) < self.config.window:
            for name, column in columns.items():
                self._scales.setdefault(name, []).append(float(column.double().var(correction=0)))
        self._epochs.append(epoch)
        found = self._alarms()
        for kind, message in found.items():
            if kind not in self._warned:
                self._warned.append(kind)
                warnings.warn(message, stacklevel=2)
        values.pop("trained")
        return {**{f"monitor/{name}": value for name, value in values.items()}, "monitor/alarms": float(len(found))}

    def _alarms(self) -> dict[str, str]:
        """Return the alarms that hold now: kind to one line."""
        low = {f"collapse/{name}": self._low(name) for name in ("reward_spread", "sample_distance")}
        out = {kind: line for kind, line in low.items() if line}
        if self.config.kl is not None and self._series["kl"][-1] > self.config.kl:
            out["kl"] = f"monitor: the KL to the base model is {self._series['kl'][-1]:.3g}, above {self.config.kl:g}"
        falls = [found for name in self._watched if (found := self._fallen(name)) is not None]
        if not falls:
            return out
        back = min(self._epochs[index] for _, index, _ in falls)
        what = ", ".join(f"{name} fell by {drop:.2g} since epoch {self._epochs[index]}" for name, index, drop in falls)
        message = (
            f"monitor: at epoch {self._epochs[-1]} the trained reward still rises while {what} (in standard deviations"
            f"{self._drift(back)}): the reward is being exploited; go back to epoch {back}, its checkpoint or "
            f"train.epochs={back}, and add what fell to the reward"
        )
        if self.config.action == "stop":
            self.alarm = message
        return {**out, **{f"hacking/{name}": message for name, _, _ in falls}}

    def _fallen(self, name: str) -> tuple[str, int, float] | None:
        """Return (name, index of its last good epoch, fall in standard deviations) if the rule holds for a reward."""
        window = self.config.window
        smooth, trained = smoothed(self._series[name], window), smoothed(self._series["trained"], window)
        if len(smooth) <= window:
            return None
        # Windows that overlap with the present one say nothing that it does not.
        before = smooth[:-window]
        error = standard_error(self._series[name], window) * math.sqrt(2)
        good = max(index for index, value in enumerate(before) if value >= max(before) - error)
        fall, rise = smooth[good] - smooth[-1], trained[-1] - trained[good]
        needed = max(self.config.fall * self._scale(name), _ERRORS * error)
        if fall <= needed or rise <= self.config.rise * self._scale("trained"):
            return None
        return name, good + window - 1, fall / (self._scale(name) or 1.0)

    def _scale(self, name: str) -> float:
        variances = self._scales[name]
        return math.sqrt(sum(variances) / len(variances))

    def _drift(self, back: int) -> str:
        """Return how the pictures have changed since an epoch, in words; empty where they have not."""
        at = self._epochs.index(back) - self.config.window + 1
        words = []
        for name in self._statistics:
            smooth = smoothed(self._series[name], self.config.window)
            change = (smooth[-1] - smooth[at]) / (self._scale(name) or 1.0)
            if abs(change) > self.config.fall:
                words.append(f"{name} {change:+.2g}")
        return f"; meanwhile {', '.join(words)}" if words else ""

    def _low(self, name: str) -> str:
        """Return why a spread has collapsed, in one line; empty where it has not."""
        window = self.config.window
        smooth = smoothed(self._series.get(name, []), window)
        if not smooth or smooth[-1] >= self.config.collapse * max(smooth):
            return ""
        best = max(range(len(smooth)), key=lambda index: smooth[index]) + window - 1
        words = {
            "reward_spread": "the rewards of a prompt's samples are hardly apart any more",
            "sample_distance": "the samples of a prompt are nearly the same",
        }
        return (
            f"monitor: at epoch {self._epochs[-1]} {words[name]} ({smooth[-1] / max(smooth):.0%} of epoch "
            f"{self._epochs[best]}): the task is solved, or the policy has collapsed; look at the samples"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the series, as plain JSON values."""
        return {
            "epochs": list(self._epochs),
            "series": {name: list(values) for name, values in self._series.items()},
            "scales": {name: list(values) for name, values in self._scales.items()},
            "warned": list(self._warned),
            "alarm": self.alarm,
            "watched": {label: one.state_dict() for label, one in self._watched.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            UserError: the state is of other rewards.
        """
        if list(state["watched"]) != list(self._watched):
            raise UserError(
                f"monitor: the checkpoint has watched {', '.join(state['watched'])}, this run watches "
                f"{', '.join(self._watched)}; resume with the run's own configuration"
            )
        self._epochs, self._warned = list(state["epochs"]), list(state["warned"])
        # A run that was stopped goes on once its configuration says that a warning is enough.
        self.alarm = state["alarm"] if self.config.action == "stop" else ""
        self._series = {name: list(values) for name, values in state["series"].items()}
        self._scales = {name: list(values) for name, values in state["scales"].items()}
        for label, one in self._watched.items():
            one.load_state_dict(state["watched"][label])


def smoothed(series: Sequence[float], window: int) -> list[float]:
    """Return the means of every ``window`` successive values: ``len(series) - window + 1`` of them, or none."""
    return [sum(series[start : start + window]) / window for start in range(len(series) - window + 1)]


def standard_error(series: Sequence[float], window: int) -> float:
    """Return the standard error of a mean of ``window`` successive values, without what is a trend.

    Half the mean squared difference of neighbours is the variance of independent values, whatever their slow course.
    """
    squares = [(after - before) ** 2 for before, after in zip(series, series[1:], strict=False)]
    return math.sqrt(sum(squares) / len(squares) / 2 / window) if squares else 0.0


def _groups(prompts: Sequence[str]) -> list[list[int]]:
    """Return where the samples of each prompt stand, for prompts with two or more."""
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(index)
    return [rows for rows in found.values() if len(rows) > 1]


def spread(scores: Tensor, prompts: Sequence[str]) -> float | None:
    """Return the standard deviation of scores ``(B,)`` within their prompts, none where no prompt has two samples."""
    groups = _groups(prompts)
    if not groups:
        return None
    return math.sqrt(sum(float(scores[rows].double().var(correction=0)) for rows in groups) / len(groups))


def distance(thumbnails: Tensor, prompts: Sequence[str]) -> float | None:
    """Return how far two samples of a prompt are apart: the root mean square difference of ``(B, D)``, or none."""
    groups = _groups(prompts)
    if not groups:
        return None
    rms = [torch.pdist(thumbnails[rows].float()).mean() / math.sqrt(thumbnails.shape[1]) for rows in groups]
    return float(torch.stack(rms).mean())
