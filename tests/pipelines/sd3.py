"""Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny

from pipelines.parts import INPAINT, SHORT, SIZE, assemble, case, given, kl, make, masks


def sd3(cls: str, layers: int = 2, channels: int = 4, **parts: Any) -> Any:
    base = tiny.sd3_pipeline()
    transformer = make(
        df.SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=channels,
        pos_embed_max_size=8,
    )
    vae = kl(channels, shift_factor=0.0)
    return assemble(getattr(df, cls), **{**base.components, "transformer": transformer, "vae": vae, **parts})


SD3 = {"family": "Stable Diffusion 3"}


@case("StableDiffusion3Pipeline", **SD3, call={**SIZE, **SHORT}, fast=True)
def _() -> Any:
    return sd3("StableDiffusion3Pipeline")


@case(
    "StableDiffusion3Pipeline (skip-layer guidance)",
    **SD3,
    call={**SIZE, **SHORT, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6},
)
def _() -> Any:
    return sd3("StableDiffusion3Pipeline", layers=3)


@case("StableDiffusion3Img2ImgPipeline", **SD3, call={**SIZE, **SHORT, "strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return sd3("StableDiffusion3Img2ImgPipeline")


@case("StableDiffusion3InpaintPipeline", **SD3, call={**SIZE, **SHORT, "strength": 1.0}, conditions=INPAINT)
def _() -> Any:
    return sd3("StableDiffusion3InpaintPipeline", channels=16)


@case("StableDiffusion3PAGPipeline", **SD3, call={**SIZE, **SHORT})
def _() -> Any:
    return sd3("StableDiffusion3PAGPipeline", pag_applied_layers=["blocks.0"])


@case("StableDiffusion3ControlNetPipeline", **SD3, call={**SIZE, **SHORT}, conditions=given("control_image"))
def _() -> Any:
    return sd3("StableDiffusion3ControlNetPipeline", controlnet=sd3_control())


def sd3_control(**config: Any) -> Any:
    return make(
        df.SD3ControlNetModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        **config,
    )


@case("StableDiffusion3PAGImg2ImgPipeline", **SD3, call={**SIZE, **SHORT, "strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return sd3("StableDiffusion3PAGImg2ImgPipeline", pag_applied_layers=["blocks.0"])


@case("StableDiffusion3ControlNetInpaintingPipeline", **SD3, call={**SIZE, **SHORT}, conditions=given("control_image",
      control_mask=masks))  # fmt: skip
def _() -> Any:
    return sd3("StableDiffusion3ControlNetInpaintingPipeline", controlnet=sd3_control(extra_conditioning_channels=1))
