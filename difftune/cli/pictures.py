"""Pictures and grids of them, on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def free_folder(folder: Path) -> Path:
    """Return ``folder``, or ``folder-2``, ``folder-3``, ... if it is there already."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def write_pairs(base: Tensor, tuned: Tensor, prompts: Sequence[str], path: Path, limit: int = 16) -> Path:
    """Write base pictures above tuned ones, eight to a row."""
    import torch

    from difftune.report import sample_grid

    base, tuned, prompts = stills(base[:limit]), stills(tuned[:limit]), list(prompts[:limit])
    columns = min(8, len(base))
    rows, captions = [], []
    for start in range(0, len(base), columns):
        chunk = slice(start, start + columns)
        blank = torch.ones(columns - len(base[chunk]), *base.shape[1:])
        for name, images in (("base", base), ("tuned", tuned)):
            rows.append(torch.cat([images[chunk], blank]))
            captions += [f"{name}: {text or '(empty)'}" for text in prompts[chunk]] + [" "] * len(blank)
    return sample_grid(torch.cat(rows), columns, path=path, captions=captions)


def stills(images: Tensor) -> Tensor:
    """Return pictures ``(B, 3, H, W)``: of videos, the first frames."""
    return images if images.ndim == 4 else images[:, 0]


def write_pictures(images: Tensor, folder: Path, suffix: str) -> None:
    """Write one PNG per picture; the frames of a video become a folder of them."""
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()
    for index, picture in enumerate(pixels):
        frames = {f"{index:03d}{suffix}.png": picture}
        if picture.ndim == 4:
            frames = {f"{index:03d}{suffix}/{number:04d}.png": frame for number, frame in enumerate(picture)}
        for name, frame in frames.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(folder / name)
