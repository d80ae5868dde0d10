"""HPS v2 and v2.1: human preference scores, a CLIP ViT-H/14 fine-tuned on people's rankings of pictures.

Wu et al. 2023, "Human Preference Score v2" (arXiv 2306.09341): the score is the cosine of text and picture, without the
logit scale, about 0.15 to 0.35 (the tables of the paper have it times 100). It compares pictures of one prompt under
one version; across prompts or versions it means little. The picture is resized so that its longer side fits and the
rest of the square is black before the normalisation, where other CLIP models crop.

The weights are an OpenCLIP state dict below ``state_dict`` and are converted to transformers' layout on loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import LAION_H, MEAN, STD, ClipReward
from difftune.rewards._preprocess import Preprocess
from difftune.rewards._weights import load_state, weights_file


class _Hps(ClipReward):
    """Cosine of text and picture under the fine-tuned ViT-H/14.

    Args:
        model: the published file, the folder that holds it, or the hub id of its repository.
        tokenizer: folder or hub id of the ViT-H/14's tokenizer.
        scale: factor on the cosine (the paper's tables: 100).
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    range = "[-1, 1] times scale; about 0.15 to 0.35"
    licence = "Apache-2.0"
    memory = "3.7 GiB in fp32"
    _file = ""

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        tokenizer: str = LAION_H,
        scale: float = 1.0,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        state = load_state(self.name, weights_file(self.name, model, self._file, revision))
        super().__init__(model, tokenizer, dtype=dtype, state=state)
        self.scale = scale
        self.preprocess = Preprocess(
            None, None, None, MEAN, STD, longest_edge=self.model.config.vision_config.image_size
        )

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` cosines times ``scale``."""
        return self.scale * self.cosines(images, prompts)


@reward("hpsv2")
class HpsV2(_Hps):
    """HPS v2.0: the cosine of text and picture under a CLIP fine-tuned on people's rankings."""

    weights = "hub: xswu/HPSv2, HPS_v2_compressed.pt"
    _file = "HPS_v2_compressed.pt"


@reward("hpsv2_1")
class HpsV21(_Hps):
    """HPS v2.1: as v2.0, trained on more and cleaner rankings."""

    weights = "hub: xswu/HPSv2, HPS_v2.1_compressed.pt"
    _file = "HPS_v2.1_compressed.pt"
