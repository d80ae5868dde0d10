"""Sample grids: pictures in rows, with their prompts below."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difftune.report.files import replace_file

_TILE = 144
"""Least side of a picture in a grid, in pixels: smaller ones are enlarged by a whole factor."""

_GAP = 6

_CAPTION_LINES = 2

_FONT_SIZE = 13


def sample_grid(images: Tensor, columns: int, *, path: str | Path, captions: Sequence[str] | None = None) -> Path:
    """Write pictures as one PNG, in rows.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1], at least one. Small pictures are enlarged by a whole factor, unsmoothed.
        columns: pictures in a row, at least 1.
        path: where to write; the folder is made, the file replaced atomically.
        captions: ``B`` lines to put below the pictures; cut where they do not fit.

    Returns:
        ``path``.

    Raises:
        ValueError: wrong shapes or counts.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"sample_grid got images {tuple(images.shape)}, expected (B, 3, H, W) with B at least 1")
    if columns < 1:
        raise ValueError(f"sample_grid got {columns} columns, expected at least 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"sample_grid got {len(captions)} captions for {len(images)} images")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    factor = max(1, math.ceil(_TILE / max(pixels.shape[1:3])))
    height, width = pixels.shape[1] * factor, pixels.shape[2] * factor
    font = ImageFont.load_default(_FONT_SIZE)
    text_height = 0 if captions is None else _CAPTION_LINES * (_FONT_SIZE + 3) + 4
    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    sheet_size = (columns * (width + _GAP) + _GAP, rows * (height + text_height + _GAP) + _GAP)
    sheet = Image.new("RGB", sheet_size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pixels):
        x = _GAP + index % columns * (width + _GAP)
        y = _GAP + index // columns * (height + text_height + _GAP)
        tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        if captions is not None:
            for row, line in enumerate(_caption_lines(captions[index], font, width)):
                draw.text((x, y + height + 3 + row * (_FONT_SIZE + 3)), line, fill=(70, 70, 70), font=font)
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    return replace_file(Path(path), file.getvalue())


def _caption_lines(caption: str, font: Any, width: int) -> list[str]:
    """Cut a caption into at most two lines of ``width`` pixels; control characters are dropped."""
    # A caption can be a whole page: what cannot fit need not be measured.
    words = "".join(c if c.isprintable() else " " for c in caption[:width]).split() or ["(empty prompt)"]
    lines = [""]
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
            words.pop(0)
        elif len(lines) < _CAPTION_LINES:
            lines.append("")
        else:
            lines[-1] += " …"
            break
    return [_fit(line, font, width) for line in lines]


def _fit(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
