"""VLM-RM: the distance to a goal in words, measured along the line from a baseline in words.

Rocamonde et al. 2023, "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning" (arXiv
2310.12921), definition 1. With unit embeddings of the picture x, the goal g and the baseline b, and the direction
``d = g - b``::

    P = alpha d d^T / |d|^2 + (1 - alpha) I
    R = 1 - |P (x - g)|^2 / 2

With alpha = 0 it is the cosine of x and g; with alpha = 1 only what lies along d counts, so that everything the two
texts have in common is left out. Several texts count as the mean of their embeddings, which is not normalised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import ClipReward
from difftune.types import UserError


def goal_baseline(x: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """Return R ``(B,)`` of unit embeddings x ``(B, D)``, goals and baselines ``(B, D)`` or ``(D,)``."""
    direction, away = goal - baseline, x - goal
    # A goal that is its own baseline has no direction: nothing lies along it.
    along = (away * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-12)
    projected = alpha * along * direction + (1 - alpha) * away
    return 1 - projected.square().sum(-1) / 2


@reward("vlm_rm")
class VlmRm(ClipReward):
    """Distance of the picture to a goal text, along the direction from a baseline text to it; at most 1.

    Args:
        goal: text or texts; by default the sample's own prompt.
        baseline: text or texts that describe the picture without what is wanted.
        alpha: 0 for the plain cosine, 1 for the projection on the direction.
        model: embedded name, folder, hub id, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id, where the model brings none.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    range = "[-1, 1] for alpha = 0, at most 1 otherwise"
    weights = "embedded (difftune/tiny-clip), or any CLIP"
    licence = "Apache-2.0 (embedded), else the model's"
    memory = "1.6 GiB as ViT-L/14 in fp32"

    def __init__(
        self,
        goal: str | list[str] | None = None,
        baseline: str | list[str] = "a picture",
        alpha: float = 0.5,
        model: str = "difftune/tiny-clip",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(f"reward {self.name!r}: alpha is {alpha}, expected 0 to 1")
        super().__init__(model, tokenizer, revision, dtype)
        self.goal, self.baseline, self.alpha = goal, baseline, alpha

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` rewards."""
        pictures = self.embed_images(images)
        goal = self.embed_prompts(prompts) if self.goal is None else self._mean(self.goal)
        baseline = self._mean(self.baseline)
        return goal_baseline(pictures, goal.to(pictures.device), baseline.to(pictures.device), self.alpha)

    def _mean(self, texts: str | list[str]) -> Tensor:
        return torch.mean(self.embed_prompts([texts] if isinstance(texts, str) else texts), 0)
