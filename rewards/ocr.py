"""OCR: how much of the text that the prompt asks for can be read in the picture.

The formula is Flow-GRPO's (Liu et al. 2025, arXiv 2505.05470): with spaces dropped and lower case, ``r = 1 - d / n``, n
the length of the wanted text and d the edit distance between it and all that was read, at most n, and 0 where the
wanted text occurs in what was read. Flow-GRPO reads with PaddleOCR; here PP-OCRv4's detector and recogniser read, which
the package ``rapidocr-onnxruntime`` ships, so that no download is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.reward import Reward, reward
from difftune.rewards._preprocess import to_uint8
from difftune.rewards._rapidocr import reader
from difftune.rewards._text import edit_distance, wanted_text
from difftune.types import UserError


@reward("ocr")
class Ocr(Reward):
    """How much of the wanted text is read in the picture by PP-OCRv4; 1 is all of it.

    The text is the metadata's ``text``, else what the prompt has in double quotes, else the whole prompt.

    Args:
        match: ``edit``, one minus the edit distance in characters, in shares of the wanted text; ``exact``, 1 if what
            was read is the wanted text and nothing else, else 0. Spaces and case do not count.
        side: the shorter side that a smaller picture is enlarged to before text is looked for, in pixels. More finds
            smaller letters and costs the square.
    """

    range = "[0, 1]"
    weights = "package rapidocr-onnxruntime: PP-OCRv4"
    licence = "Apache-2.0"
    memory = "0.02 GiB"

    def __init__(self, match: Literal["edit", "exact"] = "edit", side: int = 320) -> None:
        if match not in ("edit", "exact"):
            raise UserError(f"reward {self.name!r}: match is {match!r}, expected 'edit' or 'exact'")
        self.match, self._reader = match, reader(self.name, side)

    def read(self, picture: Tensor) -> list[str]:
        """Return the lines of text in a picture ``(3, H, W)`` in [0, 1], from top to bottom."""
        # The package takes arrays as OpenCV has them: rows, columns, blue to red.
        pixels = to_uint8(picture).permute(1, 2, 0).flip(-1).contiguous().numpy()
        lines, _ = self._reader(pixels)
        return [text for _, text, _ in lines or ()]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` in [0, 1]."""
        wanted = [wanted_text(self.name, *sample) for sample in zip(prompts, metadata, strict=True)]
        read = ["".join(self.read(image)) for image in images]
        pairs = zip(wanted, read, strict=True)
        return torch.tensor([likeness(*pair, exact=self.match == "exact") for pair in pairs], device=images.device)


def likeness(wanted: str, read: str, exact: bool = False) -> float:
    """Return how much of ``wanted`` is in ``read``, in [0, 1]; where nothing is wanted, 1 if nothing was read."""
    wanted, read = ("".join(text.split()).lower() for text in (wanted, read))
    if exact or not wanted:
        return float(wanted == read)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(wanted, read), len(wanted)) / len(wanted)
