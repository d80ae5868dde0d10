"""What the CLIP scorers share: loading a CLIP model from any of its formats, and its unit embeddings.

Three formats are read into transformers' ``CLIPModel``: a folder or hub id in its own layout, an embedded model
(``difftune/...``), and a state dict of OpenCLIP (or of OpenAI's code, which has the same names), whose geometry is
inferred from the shapes of its tensors. The conversion copies numbers and splits the fused attention projections; it
changes none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from difftune.registry import nearest
from difftune.reward import Reward
from difftune.rewards._preprocess import Preprocess
from difftune.rewards._weights import is_weights_file, load_state
from difftune.types import UserError

_CACHE_LIMIT = 20_000
"""Prompts whose embeddings are kept: 60 MB at 768 dimensions."""

_CHUNK = 32
"""Pictures that go through the tower at once where no gradient is asked for."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Per channel, what CLIP's preprocessing subtracts."""

STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, what CLIP's preprocessing divides by."""

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The hub id of the ViT-H/14 whose tokenizer PickScore and HPS use."""

# Widths of vision towers whose heads are not 64 wide, in OpenCLIP's configurations.
_HEADS = {1280: 16, 1408: 16, 1664: 16}


class ClipReward(Reward):
    """A scorer on the unit embeddings of a CLIP model; subclasses say what becomes of them.

    Args:
        model: an embedded name, a folder, a hub id, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id of the tokenizer, where the model brings none; the image processor too is taken from
            there where the model has none and that one fits, and is CLIP's standard at the model's size otherwise.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model, e.g. ``"float32"`` or ``"bfloat16"``; embeddings are at least fp32.
        activation: of an OpenCLIP state dict: ``gelu``, or ``quick_gelu`` for OpenAI's models.
        state: an OpenCLIP state dict in place of ``model``.
    """

    differentiable = True

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        activation: str = "gelu",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        precision = floating(self.name, dtype)
        # Imported late: listing the rewards must not cost the seconds that transformers takes.
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        source = embedded(self.name, model)
        if state is None and is_weights_file(source):
            state = load_state(self.name, source)
        if state is None:
            self.model: Any = CLIPModel.from_pretrained(source, dtype=precision, **pinned)
            words = source if tokenizer is None else embedded(self.name, tokenizer)
            self.tokenizer = CLIPTokenizer.from_pretrained(words, **(pinned if words == source else {}))
            self.preprocess = self._preprocess(CLIPImageProcessor, source, words, pinned)
        else:
            if tokenizer is None:
                raise UserError(
                    f"reward {self.name!r}: a state dict brings no tokenizer; add tokenizer: {LAION_H} or a folder"
                )
            self.tokenizer = CLIPTokenizer.from_pretrained(embedded(self.name, tokenizer))
            self.model = from_open_clip(self.name, state, self.tokenizer.eos_token_id, activation).to(precision)
            side = self.model.config.vision_config.image_size
            # What OpenCLIP's own code does, and OpenAI's.
            self.preprocess = Preprocess(side, None, (side, side), MEAN, STD, torchvision=True)
        self.model.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    def _preprocess(self, processors: Any, source: str, words: str, pinned: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing of the model, or else that of the tokenizer's source, or else CLIP's own."""
        side = self.model.config.vision_config.image_size
        # A fine-tuned model is often published without a processor, beside the one that it began as (PickScore).
        for place, extra in ((source, pinned), *(((words, {}),) if words != source else ())):
            try:
                found = Preprocess.from_processor(processors.from_pretrained(place, **extra))
            except OSError:
                continue
            if place == source or (found.crop or found.size) == (side, side):
                return found
        return Preprocess(side, None, (side, side), MEAN, STD)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings ``(N, D)`` of ``(N, 3, H, W)`` in [0, 1], with gradients."""
        return _unit(self.image_features(images)).to(images.device)

    def image_features(self, images: Tensor) -> Any:
        """Return what the model makes of ``(N, 3, H, W)`` in [0, 1]: ``(N, D)``, not normalised, on its device."""
        if len(images) > _CHUNK and not (torch.is_grad_enabled() and images.requires_grad):
            return torch.cat([_bare(self.image_features(chunk)) for chunk in images.split(_CHUNK)])
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        return self.model.get_image_features(pixel_values=pixels)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings ``(N, D)``; each prompt is encoded once and remembered."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            if len(self._texts) + len(missing) > _CACHE_LIMIT:
                self._texts.clear()
                missing = list(dict.fromkeys(prompts))
            length = self.model.config.text_config.max_position_embeddings
            # A tensor made under inference mode could not be remembered: later gradients would refuse it. One
            # prompt at a time, so that its embedding is the same to the bit whichever prompts were seen with
            # it.
            with torch.inference_mode(False), torch.no_grad():
                for prompt in missing:
                    tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
                    tokens = tokens.to(self.model.device)
                    features = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
                    self._texts[prompt] = _unit(features)[0].cpu()
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return ``(B,)`` cosines of the pictures ``(B, 3, H, W)`` and their prompts."""
        return (self.embed_images(images) * self.embed_prompts(prompts).to(images.device)).sum(-1)


def floating(name: str, dtype: str) -> torch.dtype:
    """Return the floating-point type called ``dtype``, for the reward ``name``."""
    precision = getattr(torch, dtype, None)
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise UserError(f"reward {name!r}: dtype is {dtype!r}, expected e.g. float32 or bfloat16")
    return precision


def embedded(name: str, model: str) -> str:
    """Return the folder of an embedded model, and any other name as it is."""
    from difftune import zoo

    if not model.startswith(zoo.PREFIX):
        return model
    if model not in zoo.MODELS:
        raise UserError(f"reward {name!r}: no embedded model {model!r}{nearest(model, list(zoo.MODELS))}")
    return str(zoo.model_path(model))


def _bare(features: Any) -> Tensor:
    # transformers 5 wraps the projected embedding in an output record, earlier versions return it bare.
    return getattr(features, "pooler_output", features)


def _unit(features: Any) -> Tensor:
    embedding = _bare(features)
    return normalize(embedding if embedding.dtype == torch.float64 else embedding.float(), dim=-1)


def from_open_clip(name: str, state: Mapping[str, Tensor], end: int, activation: str = "gelu") -> Any:
    """Return transformers' ``CLIPModel`` with the weights of an OpenCLIP state dict.

    Args:
        name: the reward, for messages.
        state: names ``visual.*``, ``transformer.resblocks.*``, ``token_embedding.weight``,
            ``positional_embedding``, ``ln_final.*``, ``text_projection`` and ``logit_scale``.
        end: the tokenizer's end-of-text token, at which the text is pooled.
        activation: ``gelu`` or ``quick_gelu``; the tensors do not tell.

    Heads are 64 wide, in the text tower and in vision towers but those of width 1280 (H), 1408 (g) and 1664 (bigG),
    which have 16.

    Raises:
        UserError: tensors are missing or left over.
    """
    from transformers import CLIPConfig, CLIPModel

    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"reward {name!r}: activation is {activation!r}, expected gelu or quick_gelu")
    try:
        patches, table = state["visual.conv1.weight"], state["token_embedding.weight"]
        places, positions = state["visual.positional_embedding"], state["positional_embedding"]
        width, patch = patches.shape[0], patches.shape[-1]
        text_width = table.shape[1]
        config = CLIPConfig(
            projection_dim=state["text_projection"].shape[1],
            vision_config={
                "hidden_size": width,
                "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
                "num_hidden_layers": _depth(state, "visual.transformer.resblocks."),
                "num_attention_heads": _HEADS.get(width, max(1, width // 64)),
                "image_size": patch * round((len(places) - 1) ** 0.5),
                "patch_size": patch,
                "hidden_act": activation,
                "projection_dim": state["text_projection"].shape[1],
            },
            text_config={
                "hidden_size": text_width,
                "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
                "num_hidden_layers": _depth(state, "transformer.resblocks."),
                "num_attention_heads": max(1, text_width // 64),
                "max_position_embeddings": len(positions),
                "vocab_size": len(table),
                "hidden_act": activation,
                "bos_token_id": end - 1,
                "eos_token_id": end,
                "projection_dim": state["text_projection"].shape[1],
            },
        )
        converted = _renamed(state)
    except KeyError as error:
        raise UserError(f"reward {name!r}: the file is no OpenCLIP state dict, it has no {error.args[0]}") from None
    with torch.device("meta"):
        model = CLIPModel(config)
    left, more = set(model.state_dict()) - set(converted), set(converted) - set(model.state_dict())
    if left or more:
        raise UserError(
            f"reward {name!r}: the file is no OpenCLIP state dict of a ViT, "
            + (f"{min(left)} is missing" if left else f"{min(more)} has no place")
        )
    with torch.no_grad():
        model.load_state_dict({key: value.float() for key, value in converted.items()}, assign=True)
    # Buffers that no state dict holds were made on no device.
    for module in model.modules():
        if "position_ids" in module._buffers:
            table = module.get_submodule("position_embedding").get_parameter("weight")
            module._buffers["position_ids"] = torch.arange(len(table))[None]
    assert isinstance(model, nn.Module)
    return model


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# What OpenAI's archives hold beside the weights.
_IGNORED = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under transformers' names; what is unknown keeps its name."""
    out = {
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    for key, value in state.items():
        match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_)(weight|bias)", key)
        if key in ("visual.proj", "text_projection") or key in _IGNORED:
            continue
        if not match:
            out[_TOP.get(key, key)] = value
            continue
        layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
        if match[3] == "attn.in_proj":
            for which, third in zip("qkv", value.chunk(3), strict=True):
                out[f"{layer}.self_attn.{which}_proj.{match[4]}"] = third.contiguous()
        else:
            out[f"{layer}.{_BLOCK.get(match[3], match[3])}.{match[4]}"] = value
    return out
