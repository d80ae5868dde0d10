"""The program: its commands in the order of the help, and the exit codes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import difftune
from difftune.cli.artifacts import export, inspect, report
from difftune.cli.check import check
from difftune.cli.demo import demo
from difftune.cli.evaluate import evaluate
from difftune.cli.generate import generate
from difftune.cli.listing import doctor, list_, new, schema
from difftune.cli.messages import explain
from difftune.cli.score import score
from difftune.cli.serve import serve
from difftune.cli.train import train

app = typer.Typer(
    name="difftune",
    help="Fine-tune diffusion and flow models with rewards: prompts in, a stock LoRA file out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_RUNS = (train, demo, check, generate, evaluate)
_FILES = (inspect, report, export, score, serve, list_, new, schema, doctor)
for _command in (*_RUNS, *_FILES):
    app.command(_command.__name__.rstrip("_"))(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    # transformers reports every image class that torchvision, which nothing here needs, could have served; diffusers
    # reports that a LoRA of the denoiser has no keys for the text encoder.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.formatwarning = _as_a_line
    try:
        app(args=None if argv is None else list(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        code = explain(error)
        if code is None:
            raise
        return code
    return 0


def _as_a_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None) -> str:
    """Show our own warnings as what they are to the user: a line, without the line of code that gave it."""
    if Path(filename).is_relative_to(Path(difftune.__file__).parent):
        return f"difftune: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)


_FORMAT = warnings.formatwarning


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"difftune {difftune.__version__}")
        raise typer.Exit()
