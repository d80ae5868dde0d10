"""ImageReward: a BLIP that reads prompt and picture together, fine-tuned on experts' comparisons.

Xu et al. 2023, "ImageReward" (arXiv 2304.05977): the picture's tokens come from a ViT-L/16, the prompt goes through a
BERT that attends to them in every layer, and the state of its first token through five linear layers
768-1024-128-64-16-1 without activations. The score is standardised by the mean and deviation of the training set::

    r = (MLP(h_cls) - 0.16717362830052426) / 1.0333394966054072

It lies around [-2, 2]; ReFL trains with ``relu(2 - r)`` (here: loss ``hinge`` with target 2).

The published file is read as it is (names ``blip.visual_encoder.*``, ``blip.text_encoder.*``, ``mlp.layers.*``) into
transformers' BLIP classes; the geometry comes from its tensors and from ``med_config.json`` beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftune.reward import Reward, reward
from difftune.rewards._clip import MEAN, STD, embedded, floating
from difftune.rewards._preprocess import Preprocess
from difftune.rewards._weights import linear_stack, load_state, scalar_head, weights_file
from difftune.types import UserError

#: Mean and standard deviation of the published model's outputs on its training set.
SHIFT, SPREAD = 0.16717362830052426, 1.0333394966054072

_LENGTH = 35
"""Tokens that a prompt is cut or padded to."""


@reward("image_reward")
class ImageReward(Reward):
    """ImageReward: how well the picture serves the prompt, by a BLIP trained on experts' comparisons.

    Args:
        model: the published file (``ImageReward.pt``), the folder that holds it, or the hub id of its repository.
        tokenizer: folder or hub id of BERT's tokenizer (uncased).
        config: ``med_config.json``; by default the one beside the file, and BERT's base geometry where there is none.
        revision: branch, tag or commit of a hub id.
        dtype: precision of BLIP; the head is fp32.
    """

    differentiable = True
    range = "about [-2, 2]"
    weights = "hub: THUDM/ImageReward, ImageReward.pt"
    licence = "Apache-2.0"
    memory = "1.7 GiB in fp32"

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "bert-base-uncased",
        config: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        file = weights_file(self.name, model, "ImageReward.pt", revision)
        settings = Path(config) if config is not None else _settings_beside(file, model, revision)
        geometry = json.loads(settings.read_text(encoding="utf-8")) if settings is not None else {}
        state = load_state(self.name, file)
        from transformers import BertTokenizer

        precision = floating(self.name, dtype)
        self.vision = _vision(self.name, state).to(precision)
        self.text = _text(self.name, state, geometry, self.vision.config.hidden_size).to(precision)
        layers, _ = linear_stack(self.name, state, r"mlp\.layers\.", "none")
        self.head = scalar_head(self.name, layers, self.text.config.hidden_size)
        self.tokenizer = BertTokenizer.from_pretrained(embedded(self.name, tokenizer))
        side = self.vision.config.image_size
        self.preprocess = Preprocess(side, None, (side, side), MEAN, STD, torchvision=True)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` standardised scores."""
        pixels = self.preprocess(images.to(self.vision.device)).to(self.vision.dtype)
        tokens = self.vision(pixel_values=pixels).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt"
        ).to(pixels.device)
        states = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
            # The class is built as a decoder to get its cross-attention; the text is read in both directions.
            is_decoder=False,
        ).last_hidden_state
        return ((self.head(states[:, 0].float()).squeeze(-1) - SHIFT) / SPREAD).to(images.device)


def _settings_beside(file: Path, model: str, revision: str | None) -> Path | None:
    beside = file.with_name("med_config.json")
    if beside.is_file():
        return beside
    if Path(model).exists():
        return None
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "med_config.json", revision=revision))


_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _vision(name: str, state: Mapping[str, Tensor]) -> Any:
    """Return BLIP's vision tower; heads are 64 wide, as in every ViT of its authors."""
    from transformers import BlipVisionConfig, BlipVisionModel

    own = _below(state, "blip.visual_encoder.")
    try:
        patches, places = own["patch_embed.proj.weight"], own["pos_embed"]
        depth = 1 + max(int(key.split(".")[1]) for key in own if key.startswith("blocks."))
        inner = own["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError):
        raise UserError(f"reward {name!r}: the file has no blip.visual_encoder, is it ImageReward.pt?") from None
    config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=max(1, patches.shape[0] // 64),
        image_size=patches.shape[-1] * round((places.shape[1] - 1) ** 0.5),
        patch_size=patches.shape[-1],
        # The original ViT's own; transformers' default is 1e-5.
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    renamed = {}
    for key, value in own.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if match:
            renamed[f"encoder.layers.{match[1]}.{_VISION[match[2]]}.{match[3]}"] = value
        else:
            stem, dot, kind = key.rpartition(".")
            renamed[_VISION.get(key) or f"{_VISION.get(stem, stem)}{dot}{kind}"] = value
    return _filled(name, BlipVisionModel(config), renamed)


def _text(name: str, state: Mapping[str, Tensor], geometry: Mapping[str, Any], width: int) -> Any:
    """Return BLIP's text tower with its cross-attention to ``width`` numbers per picture token."""
    from transformers.models.blip.configuration_blip import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    own = _below(state, "blip.text_encoder.")
    own.pop("embeddings.position_ids", None)
    if "embeddings.word_embeddings.weight" not in own:
        raise UserError(f"reward {name!r}: the file has no blip.text_encoder, is it ImageReward.pt?")
    words = len(own["embeddings.word_embeddings.weight"])
    config = BlipTextConfig(
        vocab_size=words,
        # No tokens are generated; the configuration only wants numbers that exist.
        bos_token_id=words - 2,
        sep_token_id=words - 1,
        hidden_size=own["embeddings.word_embeddings.weight"].shape[1],
        encoder_hidden_size=width,
        intermediate_size=own["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in own if key.startswith("encoder.layer.")),
        num_attention_heads=geometry.get("num_attention_heads", 12),
        max_position_embeddings=len(own["embeddings.position_embeddings.weight"]),
        hidden_act=geometry.get("hidden_act", "gelu"),
        layer_norm_eps=geometry.get("layer_norm_eps", 1e-12),
        is_decoder=True,
    )
    return _filled(name, BlipTextModel(config, add_pooling_layer=False), own)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _filled(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the tensors that the module has; one that it lacks is an error, one too many is the original's own."""
    missing, _ = module.load_state_dict(dict(state), strict=False)
    if missing:
        raise UserError(f"reward {name!r}: the file lacks {missing[0]} ({len(missing)} tensors in all)")
    return module.eval().requires_grad_(False)
