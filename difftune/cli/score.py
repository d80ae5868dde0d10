"""``difftune score``: pictures from outside, scored."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftune.cli.messages import clean, say
from difftune.cli.options import Device, Plugins

if TYPE_CHECKING:
    from torch import Tensor

#: Largest picture that is decoded: 64 million pixels.
MAX_PIXELS = 64_000_000

#: Pictures that are scored together.
BATCH = 16


def score(
    reward: Annotated[str, typer.Argument(help="A reward's name (difftune list rewards).")],
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WEBP files, or folders of them.")],
    prompts: Annotated[str | None, typer.Option(help="A prompt file, one line per picture in their order.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the reward, KEY=VALUE.")] = None,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Score pictures."""
    import csv
    import json

    import torch

    from difftune.config import pick_device
    from difftune.prompts import Prompt, load_prompts, metadata_of
    from difftune.registry import load_plugin
    from difftune.types import UserError

    for file in plugin or []:
        load_plugin(file)
    scorer = build_scorer(reward, settings or [])
    where = pick_device(device)
    scorer.to(where)
    files = _picture_files(images)
    entries = [Prompt(prompt or "")] * len(files) if prompts is None else load_prompts(prompts)
    if len(entries) != len(files):
        raise UserError(f"--prompts: {prompts} has {len(entries)} prompts for {len(files)} pictures, expected as many")
    rows: list[dict[str, Any]] = []
    start = 0
    while start < len(files):
        pictures = _one_size(files) if scorer.groupwise else _alike(files[start : start + BATCH])
        named, asked = files[start : start + len(pictures)], entries[start : start + len(pictures)]
        start += len(pictures)
        with torch.no_grad():
            out = scorer(pictures.to(where), [entry.text for entry in asked], metadata_of(asked))
        for i, (file, entry) in enumerate(zip(named, asked, strict=True)):
            unsure = {} if out.uncertainty is None else {"uncertainty": float(out.uncertainty[i])}
            parts = {name: float(value[i]) for name, value in out.parts.items()}
            rows.append({"image": str(file), "prompt": entry.text, "score": float(out.total[i]), **unsure, **parts})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif as_csv:
        fields = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(sys.stdout, list(fields))
        writer.writeheader()
        # A terminal must not be steered by a prompt; a file gets the prompt as it is.
        tame = clean if sys.stdout.isatty() else str
        writer.writerows({k: tame(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows)
    else:
        for row in rows:
            extra = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in _ROW)
            say(f"{row['score']:>10.4f}  {row['image']}  {extra}".rstrip())
        scores = [float(str(row["score"])) for row in rows]
        if len(scores) > 1:
            say(f"{sum(scores) / len(scores):>10.4f}  mean of {len(scores)}")


_ROW = ("image", "prompt", "score")


def build_scorer(reward: str, settings: Sequence[str]) -> Any:
    """Build a reward from its name and ``KEY=VALUE`` settings."""
    from difftune.config import load_reward, parse_yaml
    from difftune.types import UserError

    spec: dict[str, Any] = {"name": reward}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set: got {setting!r}, expected KEY=VALUE")
        spec.update(parse_yaml(f"{key}: {value}", "--set"))
    return load_reward(spec)


def _picture_files(paths: Sequence[Path]) -> list[Path]:
    """Return the picture files, those of folders in the order of their names."""
    from difftune.types import UserError

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"picture {str(path)!r} does not exist")
    if not files:
        raise UserError(f"no pictures in {', '.join(map(str, paths))}: expected PNG, JPEG or WEBP files")
    return files


def _alike(paths: Sequence[Path]) -> Tensor:
    """Return the first pictures that are of one size, as ``(B, 3, H, W)``, at least one."""
    import torch

    found: list[Tensor] = []
    for path in paths:
        picture = read_picture(path)
        if found and picture.shape != found[0].shape:
            break
        found.append(picture)
    return torch.cat(found)


def _one_size(paths: Sequence[Path]) -> Tensor:
    """Return pictures as ``(B, 3, H, W)``."""
    import torch

    from difftune.types import UserError

    pictures = [read_picture(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = [f"{one.shape[-1]} x {one.shape[-2]}" for one in (pictures[0], picture)]
            raise UserError(
                f"picture {str(path)!r} is {sizes[1]} and {str(paths[0])!r} {sizes[0]}: this reward compares pictures "
                "with one another, expected one size"
            )
    return torch.cat(pictures)


def read_picture(path: Path) -> Tensor:
    """Return a picture as ``(1, 3, H, W)`` in [0, 1]; its size is looked at before it is decoded."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from difftune.types import UserError

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"picture {str(path)!r} is {image.width} x {image.height}, expected at most {MAX_PIXELS:,} pixels"
                )
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {str(path)!r} cannot be read as PNG, JPEG or WEBP ({error})") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
