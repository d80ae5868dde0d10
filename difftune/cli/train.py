"""``difftune train``: a configuration run to its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftune.cli.evaluate import evaluate_run
from difftune.cli.interrupts import Interrupts
from difftune.cli.messages import complain, explain, say
from difftune.cli.options import Config, Overrides
from difftune.cli.results import tell_results

if TYPE_CHECKING:
    from difftune.config import RunConfig
    from difftune.tracking import Progress
    from difftune.types import Metrics


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
) -> None:
    """Train a LoRA by reward and save it, with metrics, sample grids and a report."""
    from difftune.config import load_config

    settings = [*(overrides or []), *([f"out={quoted(out)}"] if out is not None else [])]
    raise typer.Exit(run_config(load_config(config, settings), resume))


def quoted(path: Path) -> str:
    """Return a path as YAML reads it back, whatever is in it."""
    import json

    return json.dumps(str(path))


def run_config(config: RunConfig, resume: bool) -> int:
    """Run a configuration to its end and return the exit code."""
    out = Path(config.out or "runs/run")
    _claim(out, config, resume)
    again = f"difftune train {out} --resume"
    with Interrupts() as interrupts:
        try:
            _run_epochs(config, resume, interrupts)
            comparison = None if config.evaluate is None else evaluate_run(out, config)
        except KeyboardInterrupt:
            complain(f"interrupted; resume with: {again}")
            return 130
        except Exception as error:
            code = explain(error)
            if code == 1:
                complain(f"{_last_checkpoint(out)}; resume with: {again} (settings that alter results need a new run)")
            if code is None:
                raise
            return code
    if _is_first():
        tell_results(out, comparison, config.plugins)
    return 0


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _last_checkpoint(out: Path) -> str:
    from difftune.checkpoint import checkpoints

    found = checkpoints(out / "checkpoints")
    return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint yet"


def _claim(out: Path, config: RunConfig, resume: bool) -> None:
    """Write ``config.yaml`` into the run's folder, unless that folder is another run's.

    Of several processes all look, and the first one writes.
    """
    from difftune.checkpoint import checkpoints, write_atomically
    from difftune.config import changed_keys, read_yaml, resolve, to_yaml
    from difftune.types import UserError

    file = out / "config.yaml"
    if resume:
        if not out.is_dir():
            raise UserError(f"resume: {out} does not exist; start the run without --resume")
        changed = changed_keys(read_yaml(file), resolve(config)) if file.is_file() else []
        if changed:
            raise UserError(
                f"resume: the run in {out} has other values of {', '.join(changed)}, which alter its results; resume "
                f"with difftune train {out} --resume, or start a new run with --out"
            )
    elif (out / "metrics.jsonl").exists() or checkpoints(out / "checkpoints"):
        raise UserError(
            f"out: {out} already holds a run; go on with difftune train {out} --resume, or choose another with --out"
        )
    if not _is_first():
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, to_yaml(resolve(config)))


def _run_epochs(config: RunConfig, resume: bool, interrupts: Interrupts) -> None:
    """Build, train and save."""
    from difftune.config import build

    out = Path(config.out or "")
    say(f"loading {config.model.id}; the run is in {out}")
    run = build(config)
    trainer = run.trainer(resume=resume, listener=lambda *phase: None)
    progress = _progress(trainer, config)

    def listen(phase: str, done: int, total: int) -> None:
        interrupts.check()
        progress.phase(phase, done, total)

    trainer.listener = listen
    if trainer.epoch:
        say(f"resumed after epoch {trainer.epoch}")
    with progress, interrupts.held():
        if config.train.sample_every and not trainer.epoch:
            progress.phase("samples of the base model", 0, 0)
        for metrics in _epochs(trainer, interrupts, progress):
            progress.finished(metrics)
        trainer.save()
    interrupts.check()


def _epochs(trainer: Any, interrupts: Interrupts, progress: Progress) -> Iterator[Metrics]:
    """Iterate over the trainer, and let signals through to it alone: it saves what it is before it gives up."""
    iterator = iter(trainer)
    # The clock of the first epoch starts after the base model's samples, with the first phase that is reported.
    listen, begun = trainer.listener, False

    def begin(*phase: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            progress.begin()
        listen(*phase)

    trainer.listener = begin
    while True:
        try:
            with interrupts.held(False):
                interrupts.check()
                metrics = next(iterator, None)
        except KeyboardInterrupt:
            # It may have come just before the trainer went on: told now, it saves; told a second time, it is silent.
            with contextlib.suppress(KeyboardInterrupt):
                iterator.throw(KeyboardInterrupt())
            raise
        if metrics is None:
            return
        yield metrics


def _progress(trainer: Any, config: RunConfig) -> Progress:
    from rich.console import Console

    from difftune.tracking import LiveProgress, Progress

    console = Console()
    sizes = (config.train.epochs, config.train.sample_every, trainer.epoch)
    if not trainer.accelerator.is_main_process:
        return Progress(*sizes, write=lambda line: None)
    return LiveProgress(*sizes, console) if console.is_terminal else Progress(*sizes, write=say)
