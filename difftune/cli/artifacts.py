"""``difftune inspect``, ``report`` and ``export``: what a run has left behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from difftune.cli.adapters import locate, model_of, settings_of
from difftune.cli.messages import say
from difftune.cli.options import Adapter, Model


def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA file, an adapter's folder or a run's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what is in a LoRA file and which programs will load how much of it."""
    import json

    from difftune.export import inspect_adapter

    found = inspect_adapter(locate(file))
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    keys = ("file", "format", "family", "components", "layers", "tensors", "parameters", "dtypes", "ranks", "scales")
    for key in keys:
        value = found[key]
        say(f"{key:<11}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    say(f"{'norm':<11}{found['norm']:.6g}{'' if found['finite'] else '  NOT FINITE'}")
    for program, loader in found["loaders"].items():
        note = f" ({loader['note']})" if loader["note"] else ""
        say(f"{program:<11}{loader['matched']} of {loader['total']} layers{note}")
    for key in ("difftune.base_model", "difftune.rewards", "difftune.algorithm", "difftune.epoch", "difftune.version"):
        if key in found["metadata"]:
            say(f"{key.removeprefix('difftune.'):<11}{found['metadata'][key]}")


def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html again: reward curve, before and after, in one file."""
    from difftune.report import write_report
    from difftune.types import UserError

    if not (run / "metrics.jsonl").is_file() and not (run / "config.yaml").is_file():
        raise UserError(f"{str(run)!r} is no run's folder: expected one with metrics.jsonl")
    say(str(write_report(run)))


def export(
    adapter: Adapter,
    layout: Annotated[str, typer.Option("--format", help="diffusers, or kohya (ComfyUI, A1111).")],
    out: Annotated[Path, typer.Option(help="A folder, or a file ending in .safetensors.")],
    model: Model = None,
) -> None:
    """Write a LoRA in the layout another program reads; its base model is loaded to match the keys."""
    import json

    from difftune.config import base_model_name, load_model
    from difftune.export import WEIGHTS, inspect_adapter, load_adapter, save_adapter
    from difftune.types import UserError

    if layout not in ("diffusers", "kohya"):
        raise UserError(f"--format: got {layout!r}, expected diffusers or kohya")
    source = locate(adapter)
    settings = settings_of(source)
    base = model_of(settings, model)
    pipe = load_model(base)
    load_adapter(pipe, source, "default")
    header = inspect_adapter(source)["metadata"]
    name = out.stem if out.suffix == ".safetensors" else header.get("difftune.name", "adapter")
    with tempfile.TemporaryDirectory(prefix="difftune-export-") as stage:
        files = save_adapter(
            pipe,
            "default",
            stage,
            config=json.loads(header.get("difftune.config", "{}")),
            metadata={key: value for key, value in header.items() if key.startswith("difftune.")},
            base_model=base_model_name(base),
            name=name,
        )
        wanted = [file for file in files if file.name == WEIGHTS or file.name.endswith("_kohya.safetensors")]
        wanted = [file for file in wanted if file.name.endswith("_kohya.safetensors") == (layout == "kohya")]
        if not wanted:
            raise UserError(f"--format {layout}: {type(pipe).__name__} has no such layout (kohya's is for UNets)")
        target = out if out.suffix == ".safetensors" else out / wanted[0].name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wanted[0], target)
    say(str(target))
