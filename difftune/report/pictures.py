"""The sample grids in the report, as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from difftune.report.data import RunData
from difftune.report.sections import section_of

_MAX_PICTURE = 2**20
"""Bytes of a sample grid that go into the report as they are; larger ones are shrunk."""


@dataclass(frozen=True)
class _Picture:
    """A sample grid as a data URL, and its width over its height."""

    url: str
    aspect: float


def pictures_section(run: RunData) -> str:
    """Return the first and the last sample grid side by side, and up to six from in between."""
    pictures = {epoch: picture for epoch, file in run.samples.items() if (picture := _picture(file)) is not None}
    if not pictures:
        return ""
    epochs = list(pictures)
    ends = "".join(_figure(epoch, pictures[epoch]) for epoch in dict.fromkeys((epochs[0], epochs[-1])))
    strip = "".join(_figure(epoch, pictures[epoch]) for epoch in _spread_out(epochs[1:-1], 6))
    # Wide grids would be too small beside each other.
    shape = " wide" if pictures[epochs[0]].aspect > 1.7 else ""
    row = f'<h3>In between</h3><div class="strip{shape}">{strip}</div>' if strip else ""
    note = "The same prompts and the same noise every time."
    return section_of("Samples", f'<div class="pair{shape}">{ends}</div>{row}', note)


def _figure(epoch: int, picture: _Picture) -> str:
    name = "base model" if epoch == 0 else f"epoch {epoch}"
    image = f'<img src="{picture.url}" alt="samples, {name}" loading="lazy">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>"


def _spread_out(items: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of ``items``, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _picture(file: Path) -> _Picture | None:
    """Return a sample grid, shrunk where it is large; ``None`` if it is no whole picture."""
    kind = "png"
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            aspect = picture.width / picture.height
            if len(data) > _MAX_PICTURE:
                small = picture.convert("RGB")
                small.thumbnail((1600, 1600))
                out = io.BytesIO()
                small.save(out, format="JPEG", quality=88)
                kind, data = "jpeg", out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return _Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", aspect)
