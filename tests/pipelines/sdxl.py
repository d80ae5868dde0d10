"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny

from pipelines.parts import INPAINT, SIZE, adapter, case, clip, control, given, masks, pictures, unet
from pipelines.stable_diffusion import sd

ADDED = {
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
