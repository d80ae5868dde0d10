"""Stable Diffusion 1 and 2, LCM and AnimateDiff."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny
import torch

from pipelines.parts import (
    INPAINT,
    SIZE,
    adapter,
    assemble,
    case,
    clip,
    control,
    ddim,
    given,
    image_processor,
    kl,
    make,
    masks,
    pictures,
    unet,
    vision,
)


def sd(cls: str, channels: int = 4, **parts: Any) -> Any:
    return assemble(
        getattr(df, cls),
        **{
            "vae": kl(),
            "text_encoder": clip(),
            "tokenizer": tiny.tokenizer(),
            "unet": unet(channels),
            "scheduler": ddim(),
            "requires_safety_checker": False,
            **parts,
        },
    )


SD = {"family": "Stable Diffusion"}


@case("StableDiffusionPipeline", **SD, call=SIZE, fast=True)
def _() -> Any:
    return sd("StableDiffusionPipeline")


@case("StableDiffusionPipeline (DPM-Solver, rescaled guidance)", **SD, call={**SIZE, "guidance_rescale": 0.7})
def _() -> Any:
    return sd("StableDiffusionPipeline", scheduler=df.DPMSolverMultistepScheduler(beta_schedule="scaled_linear"))


@case("StableDiffusionImg2ImgPipeline", **SD, call={"strength": 0.8}, conditions=given(), steps=5, fast=True)
def _() -> Any:
    return sd("StableDiffusionImg2ImgPipeline")


@case("StableDiffusionInpaintPipeline (4 channels)", **SD, call=SIZE, conditions=INPAINT, fast=True)
def _() -> Any:
    return sd("StableDiffusionInpaintPipeline")


@case("StableDiffusionInpaintPipeline (9 channels)", **SD, call=SIZE, conditions=INPAINT)
def _() -> Any:
    return sd("StableDiffusionInpaintPipeline", 9)


@case("StableDiffusionControlNetPipeline", **SD, conditions=given(), fast=True)
def _() -> Any:
    return sd("StableDiffusionControlNetPipeline", controlnet=control())


@case("StableDiffusionControlNetImg2ImgPipeline", **SD, conditions=given(control_image=pictures), steps=5)
def _() -> Any:
    return sd("StableDiffusionControlNetImg2ImgPipeline", controlnet=control())


@case(
    "StableDiffusionControlNetInpaintPipeline",
    **SD,
    call=SIZE,
    conditions=given(mask_image=masks, control_image=pictures),
)
def _() -> Any:
    return sd("StableDiffusionControlNetInpaintPipeline", controlnet=control())


@case("StableDiffusionPAGPipeline", **SD, call={**SIZE, "pag_scale": 2.0})
def _() -> Any:
    return sd("StableDiffusionPAGPipeline", pag_applied_layers="mid")


@case("StableDiffusionPAGImg2ImgPipeline", **SD, call={"strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return sd("StableDiffusionPAGImg2ImgPipeline", pag_applied_layers="mid")


@case("StableDiffusionPAGInpaintPipeline", **SD, call=SIZE, conditions=INPAINT)
def _() -> Any:
    return sd("StableDiffusionPAGInpaintPipeline", pag_applied_layers="mid")


@case("StableDiffusionControlNetPAGPipeline", **SD, conditions=given())
def _() -> Any:
    return sd("StableDiffusionControlNetPAGPipeline", controlnet=control(), pag_applied_layers="mid")


@case("StableDiffusionAdapterPipeline", **SD, call=SIZE, conditions=given())
def _() -> Any:
    return sd("StableDiffusionAdapterPipeline", adapter=adapter())


@case("StableDiffusionImageVariationPipeline", **SD, call=SIZE, conditions=given(size=32))
def _() -> Any:
    return sd("StableDiffusionImageVariationPipeline", image_encoder=vision(), feature_extractor=image_processor())


@case("StableDiffusionInstructPix2PixPipeline", **SD, conditions=given())
def _() -> Any:
    return sd("StableDiffusionInstructPix2PixPipeline", 8)


@case("StableDiffusionUpscalePipeline", **SD, call={"noise_level": 20}, conditions=given(size=8))
def _() -> Any:
    return sd(
        "StableDiffusionUpscalePipeline",
        unet=unet(7, num_class_embeds=400),
        low_res_scheduler=df.DDPMScheduler(),
        max_noise_level=350,
    )


@case("StableDiffusionLatentUpscalePipeline", **SD, conditions=given(size=16))
def _() -> Any:
    return sd(
        "StableDiffusionLatentUpscalePipeline",
        unet=unet(8, out_channels=5, time_cond_proj_dim=144),
        scheduler=df.EulerDiscreteScheduler(prediction_type="sample"),
    )


@case(
    "StableDiffusionDepth2ImgPipeline",
    **SD,
    conditions=lambda count: {"image": pictures(count), "depth_map": torch.rand(count, 16, 16)},
    steps=5,
)
def _() -> Any:
    return sd("StableDiffusionDepth2ImgPipeline", 5)


@case("LatentConsistencyModelPipeline", family="LCM", call={**SIZE, "original_inference_steps": 8}, fast=True)
def _() -> Any:
    return sd(
        "LatentConsistencyModelPipeline",
        unet=unet(time_cond_proj_dim=16),
        scheduler=df.LCMScheduler(beta_schedule="scaled_linear", original_inference_steps=8),
    )


@case(
    "LatentConsistencyModelImg2ImgPipeline",
    family="LCM",
    call={"original_inference_steps": 16, "strength": 0.8},
    conditions=given(),
)
def _() -> Any:
    return sd(
        "LatentConsistencyModelImg2ImgPipeline",
        unet=unet(time_cond_proj_dim=16),
        scheduler=df.LCMScheduler(beta_schedule="scaled_linear", original_inference_steps=16),
    )


@case("AnimateDiffPipeline", family="AnimateDiff", call={**SIZE, "num_frames": 2})
def _() -> Any:
    return sd("AnimateDiffPipeline", motion_adapter=motion())


@case(
    "AnimateDiffVideoToVideoPipeline",
    family="AnimateDiff",
    conditions=lambda count: {"video": [pictures(2) for _ in range(count)]},
    steps=5,
    batch=1,
)
def _() -> Any:
    return sd("AnimateDiffVideoToVideoPipeline", motion_adapter=motion())


def motion() -> Any:
    return make(
        df.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )


@case("AnimateDiffControlNetPipeline", family="AnimateDiff", call={**SIZE, "num_frames": 2,
      "conditioning_frames": pictures(2)}, batch=1)  # fmt: skip
def _() -> Any:
    return sd("AnimateDiffControlNetPipeline", motion_adapter=motion(), controlnet=control())
