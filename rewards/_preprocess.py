"""Tensor preprocessing shared by the scorers: what an image processor does, with gradients to the pixels.

Image processors work on uint8 pictures and cut the graph. Here the same steps (resize, centre crop, normalise) run on
tensors in [0, 1]. Antialiasing is what keeps a scorer on its training distribution: against PIL's bicubic from 512 to
224 pixels, resizing without it is about 140/255 off on white noise. What is done here is at most 1.2/255 off on any
picture, which is PIL's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MODES = {2: "bilinear", 3: "bicubic"}
"""PIL's number of a resampling filter -> torch's name of the antialiased equivalent."""


def per_frame(images: Tensor) -> tuple[Tensor, int]:
    """Return the pictures of a batch as ``(B * F, 3, H, W)`` and the number of frames F (1 for stills).

    Scores ``(B * F,)`` of the result become scores of the samples by ``scores.view(-1, F).mean(1)``.
    """
    if images.ndim == 4:
        return images, 1
    return images.flatten(0, 1), images.shape[1]


def to_uint8(images: Tensor) -> Tensor:
    """Round ``(..., H, W)`` in [0, 1] to what a picture file stores: uint8, on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize ``(N, 3, H, W)`` in [0, 1] to ``size`` (height, width): antialiased, clamped as PIL does."""
    # Rows first, then columns, each clamped: on busy pictures the overshoot that PIL cuts off in between is most of
    # the difference (up to 22/255 on white noise, 1.1/255 this way).
    for shape in ((images.shape[-2], size[1]), tuple(size)):
        if tuple(images.shape[-2:]) != shape:
            images = functional.interpolate(images, size=shape, mode=mode, antialias=True, align_corners=False)
            images = images.clamp(0, 1)
    return images


@dataclass(frozen=True)
class Preprocess:
    """What an image processor does to a picture, as a function of tensors.

    Attributes:
        shortest_edge: length in pixels that the shorter side is resized to; ``None`` where :attr:`size` is
            used.
        size: (height, width) to resize to without keeping proportions; ``None`` for no such resize.
        crop: (height, width) of the centre crop; ``None`` for no crop.
        mean: per channel, subtracted.
        std: per channel, divided by.
        mode: ``"bicubic"`` or ``"bilinear"``.
        longest_edge: length in pixels that the longer side is resized to; the rest of the square is black.
        torchvision: the crop is torchvision's ``CenterCrop``, as in the code of CLIP, OpenCLIP and ImageReward, and not
            that of transformers' image processors. Where a side is too long by an odd number of pixels, transformers
            starts at the smaller half of it, torchvision at the even one.
    """

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    longest_edge: int | None = None
    torchvision: bool = False

    @classmethod
    def from_processor(cls, processor: Any) -> Preprocess:
        """Read the steps from an image processor of transformers.

        Raises:
            ValueError: the processor resizes by a rule or filter that has no equivalent here.
        """
        size = _lengths(processor, "size", "do_resize")
        if set(size) not in (set(), {"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"image processor resizes by {size}, expected shortest_edge or height and width")
        crop = _lengths(processor, "crop_size", "do_center_crop")
        resample = getattr(processor, "resample", None)
        number = 3 if resample is None else int(resample)
        if number not in _MODES:
            raise ValueError(f"image processor resamples with PIL filter {number}, expected 2 or 3 (bicubic)")
        normalise = getattr(processor, "do_normalize", True)
        return cls(
            shortest_edge=size.get("shortest_edge"),
            size=(size["height"], size["width"]) if "height" in size else None,
            crop=(crop["height"], crop["width"]) if crop else None,
            mean=tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0),
            mode=_MODES[number],
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Turn ``(N, 3, H, W)`` in [0, 1] into the model's pixel values ``(N, 3, h, w)``, differentiably.

        Half precision is raised to fp32: resizing in bf16 alone would cost two decimal digits.
        """
        pixels = images if images.dtype == torch.float64 else images.float()
        pixels = pixels.clamp(0, 1)
        height, width = pixels.shape[-2:]
        if self.shortest_edge is not None:
            short, long = min(height, width), max(height, width)
            long = int(self.shortest_edge * long / short)
            target = (self.shortest_edge, long) if height <= width else (long, self.shortest_edge)
            pixels = resize(pixels, target, self.mode)
        elif self.size is not None:
            pixels = resize(pixels, self.size, self.mode)
        elif self.longest_edge is not None:
            scale = self.longest_edge / max(height, width)
            pixels = resize(pixels, (round(height * scale), round(width * scale)), self.mode)
            tall, wide = (self.longest_edge - side for side in pixels.shape[-2:])
            pixels = functional.pad(pixels, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
        if self.crop is not None:
            pixels = _centre_crop(pixels, *self.crop, self.torchvision)
        mean = pixels.new_tensor(self.mean).view(-1, 1, 1)
        std = pixels.new_tensor(self.std).view(-1, 1, 1)
        return (pixels - mean) / std


def _lengths(processor: Any, name: str, switch: str) -> dict[str, int]:
    """Return the lengths of a size setting, none when the step is switched off."""
    setting = getattr(processor, name, None) if getattr(processor, switch, False) else None
    return {key: value for key, value in dict(setting or {}).items() if value is not None}


def _centre_crop(pixels: Tensor, height: int, width: int, torchvision: bool) -> Tensor:
    """Cut the middle ``height`` x ``width`` out; a side that is too short is padded with black first."""
    tall, wide = max(height - pixels.shape[-2], 0), max(width - pixels.shape[-1], 0)
    if tall or wide:
        # The odd row or column comes first in transformers and last in torchvision.
        left, top = (wide // 2, tall // 2) if torchvision else ((wide + 1) // 2, (tall + 1) // 2)
        pixels = functional.pad(pixels, (left, wide - left, top, tall - top))
    below, beside = pixels.shape[-2] - height, pixels.shape[-1] - width
    # Python's round takes halves to the even number, and torchvision takes Python's round.
    top, left = (round(below / 2), round(beside / 2)) if torchvision else (below // 2, beside // 2)
    return pixels[..., top : top + height, left : left + width]
