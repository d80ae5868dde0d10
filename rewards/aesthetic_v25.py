"""Aesthetic predictor v2.5: a head on SigLIP's embedding of the picture, on a scale from 1 to 10.

``discus0434/aesthetic-predictor-v2-5``: the pooled output of SigLIP's vision tower (so400m, patches of 14, 384 pixels),
normalised, through linear layers 1152-1024-128-64-16-1 without activations; 5.5 and above is meant to be great. The
head is under the AGPL: it is not part of this package and is read from a file of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from difftune.reward import Reward, reward
from difftune.rewards._clip import floating
from difftune.rewards._preprocess import Preprocess
from difftune.rewards._weights import linear_stack, load_state, scalar_head


@reward("aesthetic_v25")
class AestheticV25(Reward):
    """Aesthetic score of the picture by a head on SigLIP, about 1 to 10; the prompt does not matter.

    Args:
        head: the head's file (``aesthetic_predictor_v2_5.pth``).
        model: folder or hub id of the SigLIP it was trained on.
        activation: between the head's layers: ``none``, ``relu``, ``gelu`` or ``auto``, which knows the published head.
        revision: branch, tag or commit of the model's hub id.
        dtype: precision of SigLIP; the head is fp32.
    """

    differentiable = True
    range = "about 1 to 10, unbounded under training"
    weights = "user-supplied head; hub: google/siglip-so400m-patch14-384"
    licence = "AGPL-3.0 (head), Apache-2.0 (SigLIP)"
    memory = "1.6 GiB in fp32"

    def __init__(
        self,
        head: str,
        model: str = "google/siglip-so400m-patch14-384",
        activation: str = "auto",
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        layers, _ = linear_stack(self.name, load_state(self.name, head), r".*?", activation)
        from transformers import SiglipImageProcessor, SiglipVisionModel

        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        self.model: Any = SiglipVisionModel.from_pretrained(model, dtype=floating(self.name, dtype), **pinned)
        self.model.eval().requires_grad_(False)
        self.preprocess = Preprocess.from_processor(SiglipImageProcessor.from_pretrained(model, **pinned))
        self.head = scalar_head(self.name, layers, self.model.config.hidden_size)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` scores."""
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        embedding = normalize(self.model(pixel_values=pixels).pooler_output.float(), dim=-1)
        return self.head(embedding).squeeze(-1).to(images.device)
