"""What is printed: plain lines, on the right stream, and the exit code of what went wrong."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import sys
from pathlib import Path

import typer


def explain(error: Exception) -> int | None:
    """Say in plain lines what is wrong and return the exit code; ``None`` for what is our fault."""
    from pydantic import ValidationError

    from difftune.registry import RegistryError

    if isinstance(error, ValidationError):
        for item in error.errors():
            complain(f"{'.'.join(map(str, item['loc']))}: {item['msg']}")
        return 2
    # Our own errors live beside tensors: whoever raised one has imported them.
    types = sys.modules.get("difftune.types")
    if isinstance(error, (RegistryError, FileNotFoundError)) or (types and isinstance(error, types.UserError)):
        complain(str(error))
        return 2
    if isinstance(error, OSError) and error.errno in _DISK:
        complain(f"{error.strerror}: {error.filename or 'writing failed'}; what was saved before is intact")
        return 1
    if type(error).__name__ in _STOPS:
        complain(str(error).strip().splitlines()[0] + _STOPS[type(error).__name__])
        return 1
    return None


#: What a disk may refuse; nothing in the program can mend it.
_DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}

#: Errors that stop a run for a reason the user can act on, by name (their modules import torch), and what to do.
_STOPS = {
    "NonFiniteError": "",
    "ParityError": "",
    "CheckpointError": "",
    "ProcessError": "",
    "MonitorAlarm": "",
    "RemoteError": "",
    "OutOfMemoryError": "; lower sampler.batch_size and train.micro_batch, or set gradient_checkpointing: true",
}


def clean(text: str) -> str:
    """Drop control characters: names and prompts are data, and must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def say(text: str = "") -> None:
    """Print a line to standard output."""
    typer.echo(clean(text))


def complain(text: str) -> None:
    """Print lines to standard error, each under the program's name."""
    for line in clean(text).splitlines():
        typer.echo(f"difftune: {line}", err=True)


def command_name() -> str:
    """Return how this command can be called again: by its name if a shell finds it, else by its path."""
    if shutil.which("difftune"):
        return "difftune"
    here = Path(sys.argv[0])
    if here.name != "difftune":
        return "python -m difftune"
    with contextlib.suppress(ValueError):
        return str(here.absolute().relative_to(Path.cwd()))
    return str(here)
