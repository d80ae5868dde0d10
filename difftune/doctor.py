"""Looks before a run starts: at the machine (:func:`environment`) and at a configuration (:func:`preflight`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from difftune.config import RunConfig, build, pick_device
from difftune.trainer import TrainerConfig
from difftune.types import Metrics

#: Libraries whose versions matter to a run.
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "numpy", "Pillow")


# -- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        value: what was found.
        remedy: what to do about it, empty where nothing needs to be done.
    """

    name: str
    value: str
    remedy: str = ""


def environment() -> list[Finding]:
    """Return what matters of the machine and its installation; no secret is among it."""
    return [
        Finding("python", platform.python_version()),
        *(_library(name) for name in LIBRARIES),
        _torchvision(),
        _device(),
        Finding("memory", _bytes(memory_limit())),
        Finding("threads", f"{torch.get_num_threads()} (torch) on {cores()} cores"),
        Finding("free disk here", _bytes(shutil.disk_usage(".").free)),
        _token(),
        *_extras(),
    ]


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int:
    """Return the bytes of memory this process may use: the machine's, or the container's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total


def _library(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"pip install {name}")


def _torchvision() -> Finding:
    """torchvision is not needed, but a build for another torch breaks every import of transformers' image classes."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torchvision", "not installed (not needed)")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a foreign binary fails in many ways: RuntimeError, ImportError, OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Finding("torchvision", f"{version}, broken ({reason})", "pip uninstall torchvision")
    return Finding("torchvision", f"{version}, works")


def _device() -> Finding:
    device = pick_device()
    if device == "cuda":
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        memory = torch.cuda.get_device_properties(0).total_memory
        return Finding("device", f"cuda: {torch.cuda.device_count()} x {', '.join(sorted(names))}, {_bytes(memory)}")
    return Finding("device", device)


def _token() -> Finding:
    from huggingface_hub import get_token

    there = "present" if get_token() else "absent"
    return Finding("hub token", there, "" if there == "present" else "only gated models need one: hf auth login")


def _extras() -> list[Finding]:
    """Return the optional extras: present, or the line that installs them."""
    try:
        required = importlib.metadata.requires("difftune") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("extras", "unknown: difftune is not installed", "pip install -e .")]
    wanted: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", line)
        if extra:
            wanted.setdefault(extra.group(1), []).append(re.split(r"[<>=!~\[;( ]", line)[0])
    findings = []
    for name, packages in sorted(wanted.items()):
        missing = [package for package in packages if not _installed(package)]
        if missing:
            remedy = f"pip install 'difftune[{name}]'"
            findings.append(Finding(f"extra {name}", f"missing {', '.join(missing)}", remedy))
        else:
            findings.append(Finding(f"extra {name}", "present"))
    return findings


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


# -- a configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preflight:
    """What one real cycle of a run took, and what the whole run will take.

    Attributes:
        samples: samples of the cycle: as many as fill the sampler's batch and the micro-batch, the worst case of both.
        seconds: phase to seconds: load, rollout, score, gate, update, samples, save.
        metrics: the cycle's metrics.
        parity: the gate's figures.
        memory: peak bytes, of the GPU where there is one.
        memory_of: ``GPU`` or ``process``.
        forecast_seconds: for the whole run; the first cycle is slow, so rather too much.
        forecast_bytes: disk that the run's folder will take.
    """

    samples: int
    seconds: Mapping[str, float]
    metrics: Metrics
    parity: Mapping[str, float]
    memory: int
    memory_of: str
    forecast_seconds: float
    forecast_bytes: int

    def lines(self) -> list[str]:
        """Return the report, ready to print."""
        phases = "  ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items())
        values = self.metrics.values
        lines = [f"one cycle of {self.samples} samples: {phases}"]
        if "reward/mean" in values:
            lines.append(f"reward {values['reward/mean']:.4g} ± {values['reward/std']:.3g}")
        if self.parity:
            lines.append(
                f"parity: |ratio - 1| at most {self.parity['max_ratio_error']:.3g} over {self.parity['steps']:.0f} "
                f"steps, gradients in {self.parity['layers_reached']:.0f} of {self.parity['layers']:.0f} layers"
            )
        lines.append(f"peak memory: {_bytes(self.memory)} ({self.memory_of})")
        hours, rest = divmod(round(self.forecast_seconds), 3600)
        duration = f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
        lines.append(f"forecast: {duration}, {_bytes(self.forecast_bytes)} of disk")
        return lines


def preflight(config: RunConfig) -> Preflight:
    """Load a configuration and run one real cycle of it in a temporary folder that is removed afterwards.

    Raises:
        UserError: something cannot be loaded or does not fit together.
        ParityError: the gate does not hold.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run = build(config)
    seconds = {"load": time.perf_counter() - started}
    cycle = _one_cycle(config)
    with tempfile.TemporaryDirectory(prefix="difftune-check-") as folder:
        out = Path(folder) / "check"
        trainer = run.trainer(out=out, train=cycle)
        (metrics,) = list(trainer)
        seconds.update(metrics.seconds)
        started = time.perf_counter()
        trainer.save()
        seconds["save"] = time.perf_counter() - started
        checkpoint, adapter = _size(out / "checkpoints"), _size(out / "adapter")
        grid = max((path.stat().st_size for path in (out / "samples").glob("*.png")), default=0)
    on_gpu = torch.cuda.is_available() and trainer.policy.device.type == "cuda"
    return Preflight(
        samples=cycle.samples_per_epoch,
        seconds=seconds,
        metrics=metrics,
        parity=trainer.parity or {},
        memory=torch.cuda.max_memory_allocated() if on_gpu else _peak_memory(),
        memory_of="GPU" if on_gpu else "process",
        forecast_seconds=_forecast(config, seconds, cycle.samples_per_epoch),
        forecast_bytes=(config.train.keep_checkpoints + 1) * checkpoint + adapter + _grids(config) * grid,
    )


def _one_cycle(config: RunConfig) -> TrainerConfig:
    """Return training sizes of one update on the fewest samples that show the run's worst case."""
    train = config.train
    needed = max(min(max(config.sampler.batch_size, train.micro_batch), train.samples_per_epoch), 2)
    return train.model_copy(
        update={
            "epochs": 1,
            "prompts_per_epoch": min(math.ceil(needed / train.samples_per_prompt), train.prompts_per_epoch),
            "updates_per_epoch": 1,
            "save_every": 1,
            "sample_every": 1 if train.sample_every else 0,
        }
    )


def _grids(config: RunConfig) -> int:
    every = config.train.sample_every
    return 0 if not every else 2 + config.train.epochs // every


def _forecast(config: RunConfig, seconds: Mapping[str, float], samples: int) -> float:
    epoch = sum(seconds.get(name, 0.0) for name in ("rollout", "score", "update"))
    epochs = config.train.epochs * epoch * config.train.samples_per_epoch / samples
    once = seconds["load"] + seconds.get("gate", 0.0) + seconds["save"]
    saves = config.train.epochs // config.train.save_every * seconds["save"]
    return epochs + once + saves + _grids(config) * seconds.get("samples", 0.0)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(findings: Sequence[Finding]) -> list[str]:
    """Return findings as aligned lines, remedies behind an arrow."""
    width = max(len(finding.name) for finding in findings)
    return [f"{f.name:<{width}}  {f.value}{f'  ->  {f.remedy}' if f.remedy else ''}" for f in findings]
