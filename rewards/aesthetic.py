"""LAION's aesthetic score: a small head on CLIP's embedding of the picture, trained on people's ratings from 1 to 10.

Schuhmann et al. 2022 (``improved-aesthetic-predictor``): the unit image embedding of OpenAI's CLIP ViT-L/14 goes
through linear layers 768-1024-128-64-16-1. The two published "linear" heads have *no* activation between them, so in
evaluation they are one affine map ``y = w.x + b``, and that is how they are computed here. Being linear on a sphere,
the score has no ceiling short of ``b + |w|`` (23 for the ``sac+logos+ava1`` head, against 10 on the scale that people
used): it is the classic case of a reward that training exploits. The ReLU head is a stack like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import ClipReward
from difftune.rewards._weights import linear_stack, load_state, scalar_head


@reward("aesthetic")
class Aesthetic(ClipReward):
    """LAION's aesthetic score of the picture, about 1 to 10; the prompt does not matter.

    Args:
        head: the head's file (``sac+logos+ava1-l14-linearMSE.pth`` and its like): a stack of linear layers.
        model: the CLIP it was trained on: folder or hub id, or a file with an OpenCLIP state dict.
        activation: between the head's layers: ``none``, ``relu``, ``gelu`` or ``auto``, which knows the published heads
            by the numbers of their layers.
        tokenizer: for a model that is a file.
        revision: branch, tag or commit of the model's hub id.
        dtype: precision of the CLIP model; the head is fp32.
    """

    range = "about 1 to 10, unbounded under training"
    weights = "user-supplied head; hub: openai/clip-vit-large-patch14"
    licence = "Apache-2.0 (heads), MIT (CLIP)"
    memory = "1.6 GiB in fp32"

    def __init__(
        self,
        head: str,
        model: str = "openai/clip-vit-large-patch14",
        activation: str = "auto",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        layers, _ = linear_stack(self.name, load_state(self.name, head), r".*?", activation)
        super().__init__(model, tokenizer, revision, dtype, activation="quick_gelu")
        self.head = scalar_head(self.name, layers, self.model.config.projection_dim)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` scores."""
        embedding = self.embed_images(images)
        return self.head(embedding.to(next(self.head.parameters()).device)).squeeze(-1).to(images.device)
