"""Likeness to a reference picture: by CLIP's embeddings, or pixel by pixel.

``image_similarity`` is the cosine of two pictures under CLIP, as in DreamBooth's CLIP-I (Ruiz et al. 2022, arXiv
2208.12242); ``pixel_similarity`` is one minus the mean squared difference. ``lambda_harmonic`` weighs likeness to the
references against agreement with the prompt (Hu et al. 2024, "Subject-driven generation via preference-based
reinforcement learning", arXiv 2407.12164): with both cosines mapped to ``i, t`` in [0, 1]::

    r = 1 / (lambda / i + (1 - lambda) / t)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from difftune.reward import Reward, reward
from difftune.rewards._clip import ClipReward
from difftune.rewards._reference import NEED, reference_pictures, stacked
from difftune.types import RewardOutput, UserError


class _Likeness(ClipReward):
    """Cosine of the picture and its references under CLIP.

    Args:
        model: embedded name, folder, hub id, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id, where the model brings none.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    needs = MappingProxyType({"reference": NEED})
    weights = "embedded (difftune/tiny-clip), or any CLIP"
    licence = "Apache-2.0 (embedded), else the model's"
    memory = "1.6 GiB as ViT-L/14 in fp32"

    def likeness(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` cosines, the mean over a sample's references."""
        means = []
        for prompt, extra in zip(prompts, metadata, strict=True):
            with torch.no_grad():
                # One by one: references have sizes of their own.
                found = [self.embed_images(one[None]) for one in reference_pictures(self.name, prompt, extra)]
            means.append(torch.cat(found).mean(0))
        return (self.embed_images(images) * torch.stack(means).to(images.device)).sum(-1)


@reward("image_similarity")
class ImageSimilarity(_Likeness):
    """Cosine of the picture and its reference under CLIP; several references count as their mean."""

    range = "[-1, 1]"

    def __init__(
        self,
        model: str = "difftune/tiny-clip",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, tokenizer, revision, dtype)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` cosines."""
        return self.likeness(images, prompts, metadata)


def harmonic(image: Tensor, text: Tensor, balance: float) -> Tensor:
    """Return the harmonic mean of two scores in [0, 1], ``balance`` of it the first's; 0 and 1 give one alone."""
    if balance in (0.0, 1.0):
        return image if balance else text
    return 1 / (balance / (image + 1e-8) + (1 - balance) / (text + 1e-8))


@reward("lambda_harmonic")
class LambdaHarmonic(_Likeness):
    """Harmonic mean of likeness to the references and agreement with the prompt, both from CLIP.

    Args:
        balance: lambda, the weight of likeness: 1 for likeness alone, 0 for the prompt alone. The paper trains with
            0.3 and selects checkpoints by the same score.
        model: embedded name, folder, hub id, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id, where the model brings none.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    range = "[0, 1]"

    def __init__(
        self,
        balance: float = 0.3,
        model: str = "difftune/tiny-clip",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if not 0 <= balance <= 1:
            raise UserError(f"reward {self.name!r}: balance is {balance}, expected 0 to 1")
        super().__init__(model, tokenizer, revision, dtype)
        self.balance = balance

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` means, with the two scores as parts ``image`` and ``text``."""
        image = (self.likeness(images, prompts, metadata) + 1) / 2
        text = (self.cosines(images, prompts) + 1) / 2
        return RewardOutput(harmonic(image, text, self.balance), {"image": image, "text": text})


@reward("pixel_similarity")
class PixelSimilarity(Reward):
    """One minus the mean squared difference to the reference, which is resized to the picture."""

    differentiable = True
    needs = MappingProxyType({"reference": NEED})
    range = "[0, 1]"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` similarities; with several references, the mean."""
        means = []
        size = (images.shape[-2], images.shape[-1])
        for image, prompt, extra in zip(images.float(), prompts, metadata, strict=True):
            found = stacked(reference_pictures(self.name, prompt, extra), size).to(images.device)
            means.append(1 - (image - found).square().mean())
        return torch.stack(means)
