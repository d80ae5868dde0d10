"""JPEG size as a reward: the two verifiable rewards of DDPO.

Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (arXiv 2305.13301), section 5.1: a
picture is worth minus (compressibility) or plus (incompressibility) the kilobytes of its JPEG file at quality
95. The file is a real one, written by Pillow with its default chroma subsampling; a kilobyte is 1000 bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from difftune.reward import Reward, reward
from difftune.rewards._preprocess import per_frame, to_uint8
from difftune.types import UserError


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Return the JPEG file sizes ``(N,)`` of ``(N, 3, H, W)`` pictures in [0, 1], in kB (1000 bytes)."""
    sizes = []
    for pixels in to_uint8(images).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels, "RGB").save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class _JpegSize(Reward):
    """Sizes of samples in kB; a video counts as the mean of its frames.

    Args:
        quality: JPEG quality, 1 to 100; the paper's 95 by default.
    """

    video = True

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise UserError(f"reward {self.name!r}: quality is {quality}, expected 1 to 100")
        self.quality = quality

    def _size(self, images: Tensor) -> Tensor:
        pictures, frames = per_frame(images)
        return jpeg_kilobytes(pictures, self.quality).view(-1, frames).mean(1).to(images.device)


@reward("jpeg_compressibility")
class JpegCompressibility(_JpegSize):
    """Minus the size of the JPEG file in kB: small files, plain pictures."""

    range = "below 0, kB"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)``, -kB."""
        return -self._size(images)


@reward("jpeg_incompressibility")
class JpegIncompressibility(_JpegSize):
    """The size of the JPEG file in kB: large files, busy pictures."""

    range = "above 0, kB"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)``, kB."""
        return self._size(images)
