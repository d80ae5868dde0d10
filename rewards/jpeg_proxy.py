"""A differentiable estimate of a JPEG file's size, for algorithms that follow the reward's gradient.

The file's size is a step function of the pixels. Up to its last, entropy-coding step JPEG is smooth but for one
rounding: YCbCr, chroma averaged over 2 x 2 pixels, an orthonormal DCT of blocks of 8 x 8, division by the quantisation
tables (Annex K of the standard, scaled to the quality by the rule of the IJG's library). With x the divided
coefficients, before rounding, and the first of each block as the difference to the block before it, the estimate is::

    bytes = a sum x^2 / (x^2 + 1/4) + b sum log2(1 + |x|) + c blocks + d

The first sum is a soft count of the coefficients that do not round to 0, the second the number of bits that their sizes
take. The four constants are a least-squares fit to the sizes of Pillow's files of rendered scenes and of noise blurred
by 0 to 8 pixels, at qualities from 50 to 95: 2 % off in the mean, 11 % at most. At one quality its rank correlation
with the real sizes is 0.97 on the scenes and above 0.99 on the noise (measured by a test).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from difftune.reward import Reward, reward
from difftune.types import UserError

_LUMA = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
_CHROMA = """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""

FIT = (0.1179, 0.2790, 0.0192, 636.8)
"""Bytes per non-zero coefficient, per bit of size, per block, and per file."""


def quantisation_tables(quality: int) -> tuple[Tensor, Tensor]:
    """Return the tables ``(8, 8)`` for luma and chroma at a quality from 1 to 100."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = [torch.tensor([float(word) for word in text.split()]).view(8, 8) for text in (_LUMA, _CHROMA)]
    luma, chroma = (((table * scale + 50) / 100).floor().clamp(1, 255) for table in tables)
    return luma, chroma


def _transform() -> Tensor:
    """Return the orthonormal DCT-II as a matrix ``(8, 8)``."""
    rows, columns = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    matrix = torch.cos((2 * columns + 1) * rows * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def quantised(images: Tensor, quality: int) -> list[Tensor]:
    """Return the divided DCT coefficients of Y, Cb and Cr: ``(B, blocks, 64)`` each, not rounded."""
    pixels = images.float().clamp(0, 1) * 255
    height, width = pixels.shape[-2:]
    pixels = pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = pixels.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [(blue - luma) * 0.5 / (1 - 0.114), (red - luma) * 0.5 / (1 - 0.299)]
    planes = [luma - 128, *(avg_pool2d(plane[:, None], 2)[:, 0] for plane in chroma)]
    tables = [table.to(pixels.device) for table in quantisation_tables(quality)]
    dct = _transform().to(pixels.device)
    out = []
    for plane, table in zip(planes, (tables[0], tables[1], tables[1]), strict=True):
        blocks = plane.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).transpose(2, 3)
        coefficients = (dct @ blocks @ dct.T / table).flatten(1, 2).flatten(2)
        first = coefficients[..., :1]
        first = torch.cat([first[:, :1], first[:, 1:] - first[:, :-1]], 1)
        out.append(torch.cat([first, coefficients[..., 1:]], -1))
    return out


def jpeg_features(images: Tensor, quality: int) -> Tensor:
    """Return ``(B, 3)``: soft count of non-zero coefficients, bits of their sizes, and blocks."""
    planes = quantised(images, quality)
    count = sum((x.square() / (x.square() + 0.25)).sum((1, 2)) for x in planes)
    # |x| with a rounded tip: the estimate is smooth where a coefficient is 0.
    bits = sum(torch.log2(1 + (x.square() + 1e-4).sqrt() - 1e-2).sum((1, 2)) for x in planes)
    assert isinstance(count, Tensor) and isinstance(bits, Tensor)
    return torch.stack([count, bits, torch.full_like(count, sum(x.shape[1] for x in planes))], 1)


@reward("jpeg_proxy")
class JpegProxy(Reward):
    """Minus a differentiable estimate of the JPEG file's size in kB; weight -1 asks for busy pictures.

    Args:
        quality: JPEG quality, 1 to 100; DDPO's 95 by default.
    """

    differentiable = True
    range = "below 0, about -kB"

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise UserError(f"reward {self.name!r}: quality is {quality}, expected 1 to 100")
        self.quality = quality

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)``, minus the estimated kB."""
        features = jpeg_features(images, self.quality)
        return -(features @ features.new_tensor(FIT[:3]) + FIT[3]) / 1000
