"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="A YAML file, a recipe (difftune list recipes) or a run's folder.")]

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. train.epochs=10 algorithm.lr=1e-4.")
]

Adapter = Annotated[Path, typer.Argument(help="An adapter's folder or file, or the folder of the run that made it.")]

Model = Annotated[str | None, typer.Option(help="Base model; the one named in the adapter by default.")]

Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file with rewards or algorithms.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
