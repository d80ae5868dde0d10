"""CLIP score: how well picture and prompt agree, as the cosine of their CLIP embeddings.

Radford et al. 2021 (arXiv 2103.00020) for the model, Hessel et al. 2021 (arXiv 2104.08718) for its use as a
score. The paper's CLIPScore is ``2.5 * max(cos, 0)``; here the plain cosine is returned, times ``scale``. The
score is differentiable to the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import ClipReward


@reward("clip_score")
class ClipScore(ClipReward):
    """Cosine similarity of picture and prompt under a CLIP model, in [-1, 1] times ``scale``.

    Args:
        model: any model of transformers' ``CLIPModel`` class: an embedded name (``difftune/tiny-clip``), a
            folder or a hub id.
        scale: factor on the cosine.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model, e.g. ``"float32"`` or ``"bfloat16"``; the cosine itself is at least
            fp32.
    """

    range = "[-1, 1] times scale"
    weights = "embedded (difftune/tiny-clip), or any CLIPModel"
    licence = "Apache-2.0 (embedded), else the model's"
    memory = "1.6 GiB as ViT-L/14 in fp32"

    def __init__(
        self,
        model: str = "difftune/tiny-clip",
        scale: float = 1.0,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, revision=revision, dtype=dtype)
        self.scale = scale

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` cosines times ``scale``."""
        return self.scale * self.cosines(images, prompts)
