"""CLIP score: how well picture and prompt agree, as the cosine of their CLIP embeddings.

Radford et al. 2021 (arXiv 2103.00020) for the model, Hessel et al. 2021 (arXiv 2104.08718) for its use as a
score. The paper's CLIPScore is ``2.5 * max(cos, 0)``; here the plain cosine is returned, times ``scale``. The
score is differentiable to the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from difftune.registry import nearest
from difftune.reward import Reward, reward
from difftune.rewards._preprocess import Preprocess, per_frame
from difftune.types import UserError

_CACHE_LIMIT = 20_000
"""Prompts whose embeddings are kept: 60 MB at 768 dimensions."""


@reward("clip_score")
class ClipScore(Reward):
    """Cosine similarity of picture and prompt under a CLIP model, in [-1, 1] times ``scale``.

    Args:
        model: any model of transformers' ``CLIPModel`` class: an embedded name (``difftune/tiny-clip``), a
            folder or a hub id.
        scale: factor on the cosine.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model, e.g. ``"float32"`` or ``"bfloat16"``; the cosine itself is at least
            fp32.
    """

    differentiable = True
    video = True

    def __init__(
        self,
        model: str = "difftune/tiny-clip",
        scale: float = 1.0,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        precision = getattr(torch, dtype, None)
        if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
            raise UserError(f"reward {self.name!r}: dtype is {dtype!r}, expected e.g. float32 or bfloat16")
        # Imported late: listing the rewards must not cost the seconds that transformers takes.
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        source = _source(model)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        self.scale = scale
        self.model = CLIPModel.from_pretrained(source, dtype=precision, **pinned)
        self.model.eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(source, **pinned)
        self.preprocess = Preprocess.from_processor(CLIPImageProcessor.from_pretrained(source, **pinned))
        self._texts: dict[str, Tensor] = {}

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` cosines times ``scale``; a video counts as the mean over its frames."""
        pictures, frames = per_frame(images)
        texts = self.embed_prompts(prompts).repeat_interleave(frames, dim=0)
        cosine = (self.embed_images(pictures) * texts.to(pictures.device)).sum(-1)
        return self.scale * cosine.view(-1, frames).mean(1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings ``(N, D)`` of ``(N, 3, H, W)`` in [0, 1], with gradients."""
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels)).to(images.device)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings ``(N, D)``; each prompt is encoded once and remembered."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            if len(self._texts) + len(missing) > _CACHE_LIMIT:
                self._texts.clear()
                missing = list(dict.fromkeys(prompts))
            # A tensor made under inference mode could not be remembered: later gradients would refuse it. One
            # prompt at a time, so that its embedding is the same to the bit whichever prompts were seen with
            # it.
            with torch.inference_mode(False), torch.no_grad():
                for prompt in missing:
                    tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.model.device)
                    features = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
                    self._texts[prompt] = _unit(features)[0].cpu()
        return torch.stack([self._texts[prompt] for prompt in prompts])


def _source(model: str) -> str:
    """Return the folder of an embedded model, and any other name as it is."""
    from difftune import zoo

    if not model.startswith(zoo.PREFIX):
        return model
    if model not in zoo.MODELS:
        raise UserError(f"reward 'clip_score': no embedded model {model!r}{nearest(model, list(zoo.MODELS))}")
    return str(zoo.model_path(model))


def _unit(features: Any) -> Tensor:
    # transformers 5 wraps the projected embedding in an output record, earlier versions return it bare.
    embedding = getattr(features, "pooler_output", features)
    return normalize(embedding if embedding.dtype == torch.float64 else embedding.float(), dim=-1)
