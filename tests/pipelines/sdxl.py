"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny
import torch
import transformers as tf

from pipelines.parts import (
    INPAINT,
    SIZE,
    VOCAB,
    adapter,
    alive,
    case,
    clip,
    control,
    given,
    letters,
    make,
    masks,
    pictures,
    unet,
)
from pipelines.stable_diffusion import sd

ADDED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "cross_attention_dim": 32,
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
}


def sdxl(cls: str, channels: int = 4, **parts: Any) -> Any:
    return sd(
        cls,
        channels,
        **{
            "unet": unet(channels, **ADDED),
            "text_encoder_2": clip(True),
            "tokenizer_2": tiny.tokenizer(),
            "scheduler": df.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
            "requires_aesthetics_score": False,
            **parts,
        },
    )


SDXL = {"family": "SDXL"}


@case("StableDiffusionXLPipeline", **SDXL, call=SIZE, fast=True)
def _() -> Any:
    return sdxl("StableDiffusionXLPipeline")


@case("StableDiffusionXLImg2ImgPipeline", **SDXL, call={"strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return sdxl("StableDiffusionXLImg2ImgPipeline")


@case("StableDiffusionXLInpaintPipeline", **SDXL, call={**SIZE, "strength": 1.0}, conditions=INPAINT)
def _() -> Any:
    return sdxl("StableDiffusionXLInpaintPipeline")


@case("StableDiffusionXLControlNetPipeline", **SDXL, conditions=given())
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetPipeline", controlnet=control(**ADDED))


@case("StableDiffusionXLPAGPipeline", **SDXL, call=SIZE)
def _() -> Any:
    return sdxl("StableDiffusionXLPAGPipeline", pag_applied_layers="mid")


@case("StableDiffusionXLPAGImg2ImgPipeline", **SDXL, call={"strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return sdxl("StableDiffusionXLPAGImg2ImgPipeline", pag_applied_layers="mid")


@case("StableDiffusionXLPAGInpaintPipeline", **SDXL, call={**SIZE, "strength": 1.0}, conditions=INPAINT)
def _() -> Any:
    return sdxl("StableDiffusionXLPAGInpaintPipeline", pag_applied_layers="mid")


@case(
    "StableDiffusionXLControlNetImg2ImgPipeline",
    **SDXL,
    call={"strength": 0.8},
    conditions=given(control_image=pictures),
    steps=5,
)
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetImg2ImgPipeline", controlnet=control(**ADDED))


@case(
    "StableDiffusionXLControlNetInpaintPipeline",
    **SDXL,
    call={**SIZE, "strength": 1.0},
    conditions=given(mask_image=masks, control_image=pictures),
)
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetInpaintPipeline", controlnet=control(**ADDED))


@case("StableDiffusionXLInstructPix2PixPipeline", **SDXL, call=SIZE, conditions=given())
def _() -> Any:
    return sdxl("StableDiffusionXLInstructPix2PixPipeline", 8)


@case("StableDiffusionXLAdapterPipeline", **SDXL, call=SIZE, conditions=given())
def _() -> Any:
    return sdxl("StableDiffusionXLAdapterPipeline", adapter=adapter())


@case("StableDiffusionXLControlNetPAGPipeline", **SDXL, conditions=given())
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetPAGPipeline", controlnet=control(**ADDED), pag_applied_layers="mid")


@case(
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    **SDXL,
    call={"strength": 0.8},
    conditions=given(control_image=pictures),
    steps=5,
)
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetPAGImg2ImgPipeline", controlnet=control(**ADDED), pag_applied_layers="mid")


def union() -> Any:
    return make(
        df.ControlNetUnionModel,
        **ADDED,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
        num_control_type=6,
        num_trans_head=2,
        num_trans_channel=8,
        num_proj_channel=8,
    )


#: The control net's blocks mirror the UNet's, whose attention is in the second block for the union model.
UNION_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    **ADDED,
}


@case(
    "StableDiffusionXLControlNetUnionPipeline",
    **SDXL,
    call={"control_mode": [0]},
    conditions=given("control_image"),
    batch=1,
)
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetUnionPipeline", unet=unet(**UNION_UNET), controlnet=union())


@case(
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    **SDXL,
    call={"control_mode": [0], "strength": 0.8},
    conditions=given(control_image=pictures),
    steps=5,
    batch=1,
)
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetUnionImg2ImgPipeline", unet=unet(**UNION_UNET), controlnet=union())


@case(
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    **SDXL,
    call={**SIZE, "control_mode": [0], "strength": 1.0},
    conditions=given(mask_image=masks, control_image=pictures),
    batch=1,
)
def _() -> Any:
    return sdxl("StableDiffusionXLControlNetUnionInpaintPipeline", unet=unet(**UNION_UNET), controlnet=union())


@case("StableDiffusionXLControlNetXSPipeline", **SDXL, conditions=given())
def _() -> Any:
    net = unet(**{**ADDED, "layers_per_block": 2})
    adapter = df.ControlNetXSAdapter.from_unet(net, size_ratio=1, conditioning_embedding_out_channels=(2, 2))
    return sdxl("StableDiffusionXLControlNetXSPipeline", unet=net, controlnet=alive(adapter))


@case("AnimateDiffSDXLPipeline", family="AnimateDiff", call={**SIZE, "num_frames": 2})
def _() -> Any:
    adapter = make(
        df.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    return sdxl("AnimateDiffSDXLPipeline", motion_adapter=adapter)


class Positions(tf.PreTrainedTokenizerFast):
    """A tokenizer that numbers the tokens, as ChatGLM's does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        out["position_ids"] = torch.arange(out["input_ids"].shape[1]).expand(out["input_ids"].shape)
        return out


def kolors(cls: str, **parts: Any) -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel, RMSNorm

    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=VOCAB,
        hidden_size=16,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        seq_length=512,
        add_qkv_bias=True,
        bias_dropout_fusion=False,
        original_rope=True,
    )
    # Without `empty_init=False` all of its weights are whatever lay in memory, and those of its norms are anyway.
    text_encoder = make(ChatGLMModel, config=config, empty_init=False)
    for module in text_encoder.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)
    return sdxl(
        cls,
        text_encoder=text_encoder,
        tokenizer=letters(padding="left", cls=Positions),
        unet=unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj", **ADDED),
        **parts,
    )


KOLORS = {**SIZE, "max_sequence_length": 16}


@case("KolorsPipeline", family="Kolors", call=KOLORS)
def _() -> Any:
    return kolors("KolorsPipeline")


@case("KolorsImg2ImgPipeline", family="Kolors", call={**KOLORS, "strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return kolors("KolorsImg2ImgPipeline")


@case("KolorsPAGPipeline", family="Kolors", call=KOLORS)
def _() -> Any:
    return kolors("KolorsPAGPipeline", pag_applied_layers="mid")
