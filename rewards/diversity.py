"""Diversity: how far a sample is from the others that the same prompt gave.

Training by reward makes the samples of a prompt alike; as a term, this score pays for staying apart. On the unit
embeddings f of CLIP, within the G samples of a prompt::

    mean:     d_i = mean_{j != i} (1 - f_i . f_j)
    nearest:  d_i = min_{j != i} (1 - f_i . f_j)

A prompt with one sample has the diversity 0. The Vendi score, ``exp`` of the entropy of the eigenvalues of F F^T / G
(Friedman and Dieng 2022, arXiv 2210.02410), is the effective number of different samples and is logged as a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.advantage import groups_of
from difftune.prompts import told_apart
from difftune.reward import reward
from difftune.rewards._clip import ClipReward
from difftune.types import RewardOutput, UserError


def distances(features: Tensor) -> Tensor:
    """Return cosine distances ``(G, G)`` of unit features ``(G, D)``."""
    return 1 - features @ features.T


def vendi(features: Tensor) -> float:
    """Return the Vendi score of unit features ``(G, D)``: 1 if all are the same, G if all are orthogonal."""
    values = torch.linalg.eigvalsh((features @ features.T / len(features)).double()).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


@reward("diversity")
class Diversity(ClipReward):
    """Distance of the picture to the others of its prompt, under CLIP.

    Args:
        to: ``mean``, the mean distance to the others; ``nearest``, the distance to the nearest.
        model: embedded name, folder, hub id, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id, where the model brings none.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    groupwise = True
    range = "[0, 2]"
    weights = "embedded (difftune/tiny-clip), or any CLIP"
    licence = "Apache-2.0 (embedded), else the model's"
    memory = "1.6 GiB as ViT-L/14 in fp32"

    def __init__(
        self,
        to: Literal["mean", "nearest"] = "mean",
        model: str = "difftune/tiny-clip",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if to not in ("mean", "nearest"):
            raise UserError(f"reward {self.name!r}: to is {to!r}, expected 'mean' or 'nearest'")
        super().__init__(model, tokenizer, revision, dtype)
        self.to_others = to

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` distances and, as the part ``vendi``, the effective number of samples of each group."""
        features = self.embed_images(images)
        # A sum of all features, times zero: a group of one has a graph like any other.
        total = features.sum(-1) * 0
        numbers = torch.zeros(len(images), device=images.device)
        for group in groups_of(told_apart(prompts, metadata)):
            numbers[group] = vendi(features[group].detach())
            if len(group) == 1:
                continue
            apart = distances(features[group])
            others = ~torch.eye(len(group), dtype=torch.bool, device=apart.device)
            apart = apart[others].view(len(group), -1)
            index = torch.tensor(group, device=apart.device)
            total = total.index_add(0, index, apart.mean(1) if self.to_others == "mean" else apart.amin(1))
        return RewardOutput(total, {"vendi": numbers})
