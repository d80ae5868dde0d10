"""``difftune demo``: the embedded model, trained in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from difftune.cli.options import Overrides
from difftune.cli.pictures import free_folder
from difftune.cli.train import quoted, run_config


def demo(
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/demo, or the next that is free.")] = None,
) -> None:
    """Train the embedded model for a few minutes, offline, and show before and after."""
    from difftune.config import load_config
    from difftune.doctor import cores

    folder = out if out is not None else free_folder(Path("runs/demo"))
    # More threads than a small model can use only wait for one another.
    settings = [f"threads={min(cores(), 4)}", *(overrides or []), f"out={quoted(folder)}"]
    raise typer.Exit(run_config(load_config("demo", settings), resume=False))
