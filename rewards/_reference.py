"""Reference pictures that come with a prompt: from files, PIL images or tensors, as tensors in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftune.rewards._preprocess import resize
from difftune.types import UserError

_PIXELS = 64_000_000
"""Larger files are refused before they are decoded."""

_FORMATS = ("PNG", "JPEG", "WEBP")

NEED = "a reference picture: the path of a PNG, JPEG or WEBP file, or a list of them"
"""What the metadata ``reference`` is, for :attr:`difftune.reward.Reward.needs`."""


def reference_pictures(name: str, prompt: str, metadata: Mapping[str, Any], key: str = "reference") -> list[Tensor]:
    """Return the references of one sample, each ``(3, H, W)`` in [0, 1] on the CPU.

    Paths are relative to the working directory. Tensors ``(3, H, W)`` in [0, 1] and PIL images are taken as they are.

    Raises:
        UserError: there is none, or it cannot be read; the message names reward and prompt.
    """
    given = metadata[key]
    items = list(given) if isinstance(given, list | tuple) else [given]
    if not items:
        raise UserError(f"reward {name!r}: the list {key!r} of prompt {prompt!r} is empty, expected a picture")
    return [_picture(f"reward {name!r}: {key} of prompt {prompt!r}", item) for item in items]


def _picture(where: str, item: Any) -> Tensor:
    if isinstance(item, Tensor):
        if item.ndim != 3 or item.shape[0] != 3 or not item.is_floating_point():
            raise UserError(f"{where} is a {item.dtype} tensor {tuple(item.shape)}, expected floats (3, H, W)")
        return item.detach().float().cpu()
    if isinstance(item, Image.Image):
        return _tensor(item)
    if not isinstance(item, str | Path):
        raise UserError(f"{where} is {type(item).__name__}, expected the path of a picture")
    path = Path(item).expanduser()
    try:
        return _read(str(path), path.stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be read: {str(error).splitlines()[0]}") from None


@lru_cache(maxsize=256)
def _read(path: str, changed: int) -> Tensor:
    with Image.open(path, formats=_FORMATS) as picture:
        if picture.width * picture.height > _PIXELS:
            raise ValueError(f"{path} has {picture.width} x {picture.height} pixels, more than {_PIXELS}")
        return _tensor(picture)


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def stacked(pictures: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return pictures of different sizes as ``(N, 3, *size)``."""
    return torch.cat([resize(picture[None], size) for picture in pictures])
