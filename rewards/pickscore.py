"""PickScore: a CLIP model fine-tuned on half a million choices of users between two pictures.

Kirstain et al. 2023, "Pick-a-Pic" (arXiv 2305.01569), equation 1: ``s = exp(logit_scale) * cos(text, picture)``, about
15 to 26 for the published model. Code that trains with it differs in the scale: Flow-GRPO divides by 26, DanceGRPO
takes the bare cosine; ``scale`` has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import LAION_H, ClipReward


@reward("pickscore")
class PickScore(ClipReward):
    """What users would pick: ``exp(logit_scale) * cos(text, picture)`` of a fine-tuned CLIP.

    Args:
        model: folder or hub id in transformers' layout, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id of the tokenizer, and of the image processor where the model has none; by default
            the model's own, or ``CLIP-ViT-H-14-laion2B`` where the published model is asked for, which is used with it.
        scale: factor in place of ``exp(logit_scale)``: 1 for the cosine. ``None`` for the model's own, about 100.
        divide_by: divides the score: 26 is Flow-GRPO's choice.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    range = "about 15 to 26 with the published weights"
    weights = "hub: yuvalkirstain/PickScore_v1"
    licence = "MIT"
    memory = "3.7 GiB in fp32"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str | None = None,
        scale: float | None = None,
        divide_by: float = 1.0,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if tokenizer is None and model == "yuvalkirstain/PickScore_v1":
            tokenizer = LAION_H
        super().__init__(model, tokenizer, revision, dtype)
        self.scale = scale
        self.divide_by = divide_by

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` scores."""
        scale = self.model.logit_scale.detach().float().exp().item() if self.scale is None else self.scale
        return scale * self.cosines(images, prompts) / self.divide_by
