"""Social Reward, and any other CLIP that somebody fine-tuned: the cosine of text and picture.

Isajanyan et al. 2024, "Social Reward" (arXiv 2402.09872): OpenAI's CLIP ViT-L/14, its upper layers fine-tuned by a
triplet loss on what users of an editing platform did with pictures. Its weights are not published under a licence, so
they are the user's to bring; the loader takes every CLIP in transformers' layout or as an OpenCLIP state dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import ClipReward


@reward("social_reward")
class SocialReward(ClipReward):
    """Cosine of text and picture under a CLIP of the user's, e.g. Social Reward's.

    Args:
        model: a file with an OpenCLIP state dict, a folder in transformers' layout, or a hub id.
        tokenizer: folder or hub id, where the model brings none.
        activation: of a state dict: ``quick_gelu`` for OpenAI's models, ``gelu`` for LAION's.
        scale: factor on the cosine.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    range = "[-1, 1] times scale"
    weights = "user-supplied"
    licence = "the weights' own"
    memory = "1.6 GiB as ViT-L/14 in fp32"

    def __init__(
        self,
        model: str,
        tokenizer: str | None = "openai/clip-vit-large-patch14",
        activation: str = "quick_gelu",
        scale: float = 1.0,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, tokenizer, revision, dtype, activation)
        self.scale = scale

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` cosines times ``scale``."""
        return self.scale * self.cosines(images, prompts)


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.3) -> Tensor:
    """Return the loss it is trained with, ``max(|a - p|^2 - |a - n|^2 + margin, 0)``, per row of ``(B, D)``."""
    near, far = ((anchor - other).square().sum(-1) for other in (positive, negative))
    return (near - far + margin).relu()
