"""Plain statistics of the pixels: brightness, contrast, saturation, colourfulness, edges, sharpness.

Differentiable, without weights, and understood at a glance: for first experiments, for terms that keep another reward
from drifting (people's preferences are known to favour bright and colourful pictures), and as monitors of such a drift.
Luma is Rec. 709's, ``Y = 0.2126 R + 0.7152 G + 0.0722 B``, of the pixels as they are (not linearised).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from difftune.reward import Reward, reward
from difftune.types import UserError


def luma(images: Tensor) -> Tensor:
    """Return Rec. 709 luma ``(B, 1, H, W)`` of ``(B, 3, H, W)``."""
    weights = images.new_tensor([0.2126, 0.7152, 0.0722], dtype=torch.float32)
    return (images.float().clamp(0, 1) * weights.view(3, 1, 1)).sum(1, keepdim=True)


def _root(square: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return the square root, shifted so that 0 has the root 0 and a finite slope."""
    return (square + epsilon).sqrt() - epsilon**0.5


def _filtered(plane: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    weights = torch.tensor([[kernel]], dtype=plane.dtype, device=plane.device)
    return conv2d(pad(plane, (1, 1, 1, 1), mode="replicate"), weights)


class _Statistic(Reward):
    differentiable = True


@reward("brightness")
class Brightness(_Statistic):
    """Mean luma of the picture."""

    range = "[0, 1]"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` means."""
        return luma(images).mean((1, 2, 3))


@reward("contrast")
class Contrast(_Statistic):
    """Standard deviation of the luma (RMS contrast)."""

    range = "[0, 0.5]"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` deviations."""
        return _root(luma(images).flatten(1).var(1, correction=0))


@reward("saturation")
class Saturation(_Statistic):
    """Mean distance of the largest to the smallest of a pixel's red, green and blue (HSV's chroma)."""

    range = "[0, 1]"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` means."""
        pixels = images.float().clamp(0, 1)
        return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


@reward("colourfulness")
class Colourfulness(_Statistic):
    """Hasler and Suesstrunk's colourfulness: 0 is grey, 33 moderate, 109 extreme.

    2003, "Measuring colourfulness in natural images", M3: with ``rg = R - G`` and ``yb = (R + G) / 2 - B`` of pixels in
    [0, 255], ``sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)``.
    """

    range = "0 to about 180"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` values."""
        red, green, blue = (images.float() * 255).flatten(2).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        spread = _root(rg.var(1, correction=0) + yb.var(1, correction=0))
        return spread + 0.3 * _root(rg.mean(1).square() + yb.mean(1).square())


@reward("colour")
class Colour(_Statistic):
    """How near the mean colour is to a wanted one: minus the distance in RGB.

    Args:
        rgb: the wanted colour, three numbers in [0, 1].
    """

    range = "[-1.74, 0]"

    def __init__(self, rgb: list[float]) -> None:
        if len(rgb) != 3 or not all(0 <= value <= 1 for value in rgb):
            raise UserError(f"reward 'colour': rgb is {rgb}, expected three numbers in [0, 1]")
        self.rgb = list(rgb)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` distances, negated."""
        mean = images.float().mean((2, 3))
        return -_root((mean - mean.new_tensor(self.rgb)).square().sum(1))


@reward("edges")
class Edges(_Statistic):
    """Mean length of the luma's gradient by Sobel's filters: how much outline and texture there is."""

    range = "0 to about 1"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` means, in luma per pixel."""
        plane = luma(images)
        across = _filtered(plane, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
        down = _filtered(plane, [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]) / 8
        return _root(across.square() + down.square(), 1e-6).mean((1, 2, 3))


@reward("sharpness")
class Sharpness(_Statistic):
    """Logarithm of the variance of the luma's Laplacian: focus, as autofocus measures it.

    ``log10(var + 1e-6) + 6``: 0 for a flat picture, about 2 for a soft one and 5 for a crisp one (Pech-Pacheco et al.
    2000 take the variance itself, which spans four orders of magnitude).
    """

    range = "0 to about 7"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` logarithms."""
        response = _filtered(luma(images), [[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        return (response.flatten(1).var(1, correction=0) + 1e-6).log10() + 6
