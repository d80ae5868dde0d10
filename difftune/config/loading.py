"""From a file, a recipe or a run's folder to a validated configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from difftune.config.conflicts import conflicts_of
from difftune.config.memory_presets import over_preset
from difftune.config.messages import error_lines
from difftune.config.overrides import apply_override, with_absolute_paths
from difftune.config.presets import recipe_text, recipes
from difftune.config.schema import RunConfig
from difftune.config.yaml12 import parse_yaml, read_yaml
from difftune.registry import load_plugin, nearest
from difftune.types import UserError


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a configuration.

    Args:
        source: a YAML file, the name of a recipe, or the folder of a run (its ``config.yaml``).
        overrides: ``a.b.c=value`` strings; values are read as YAML, items of lists by their number.

    Raises:
        UserError: with one line per mistake, all of them.
    """
    data, base, name = _read_source(source)
    data, problems = with_absolute_paths(data, base), []
    if Path(source).is_dir():
        # A run that was moved or copied is where it is now, not where it was made.
        data["out"] = str(source)
    # A preset of the command line counts more than the file, and less than what else the command line says.
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() != "preset"):
        try:
            apply_override(data, override)
            if override.partition("=")[0].strip() == "preset":
                data = over_preset(data)
        except UserError as error:
            problems.append(str(error))
    data.setdefault("out", None)
    if data["out"] is None:
        data["out"] = f"runs/{name}"
    return validate(data, problems)


def validate(data: Mapping[str, Any], problems: Sequence[str] = (), *, trains: bool = True) -> RunConfig:
    """Validate a configuration that is a mapping already; plug-ins that it names are run first.

    Args:
        data: the mapping.
        problems: mistakes that were found before, to be reported with the others.
        trains: whether the settings must also go together for training; evaluation does not ask that.

    Raises:
        UserError: with one line per mistake, all of them.
    """
    problems = [*problems, *run_plugins(data.get("plugins"))]
    try:
        config = RunConfig.model_validate(dict(data))
    except ValidationError as error:
        problems += error_lines(error, RunConfig)
    else:
        problems += conflicts_of(config) if trains else []
        if not problems:
            return config
    raise UserError("\n".join(dict.fromkeys(problems)))


def _read_source(source: str | Path) -> tuple[dict[str, Any], Path, str]:
    """Return the data, the folder that its paths are relative to, and its name."""
    text, path = str(source), Path(source).expanduser()
    known = recipes()
    if isinstance(source, str) and text in known:
        return parse_yaml(recipe_text(text), f"recipe {text}"), Path.cwd(), text
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"config: {text} is a folder without config.yaml; expected a file, a recipe or a run")
        return read_yaml(path / "config.yaml"), path.resolve(), path.name
    if path.is_file():
        return read_yaml(path), path.resolve().parent, path.stem
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"config: {text!r} does not exist; expected a file, a run's folder or a recipe's name")
    raise UserError(f"config: unknown recipe {text!r}{nearest(text, sorted(known))} (known: {', '.join(known)})")


def run_plugins(paths: Any) -> list[str]:
    """Run the plug-in files; return what went wrong."""
    problems = []
    for index, path in enumerate(paths if isinstance(paths, list) else []):
        try:
            load_plugin(path)
        except FileNotFoundError as error:
            problems.append(f"plugins.{index}: {error}")
        except Exception as error:  # the file is the user's: whatever it raises is theirs to know of, in one line
            problems.append(f"plugins.{index}: {path} failed{_where(error, path)}: {type(error).__name__}: {error}")
    return problems


def _where(error: BaseException, path: Any) -> str:
    """Return the plug-in's own line at which it failed."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == Path(str(path)).expanduser().resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" at line {line}" if line else ""
