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
    alive,
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


@case("StableDiffusionControlNetPAGInpaintPipeline", **SD, call=SIZE,
      conditions=given(mask_image=masks, control_image=pictures))  # fmt: skip
def _() -> Any:
    return sd("StableDiffusionControlNetPAGInpaintPipeline", controlnet=control(), pag_applied_layers="mid")


@case("StableDiffusionSAGPipeline", **SD, call=SIZE)
def _() -> Any:
    return sd("StableDiffusionSAGPipeline", unet=unet(mid_block_type="UNetMidBlock2DCrossAttn"))


@case("StableDiffusionLDM3DPipeline", **SD, call=SIZE)
def _() -> Any:
    return sd("StableDiffusionLDM3DPipeline", vae=make(df.AutoencoderKL, block_out_channels=(8, 16), in_channels=6,
              out_channels=6, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
              latent_channels=4, norm_num_groups=4))  # fmt: skip


@case("SemanticStableDiffusionPipeline", **SD, call=SIZE)
def _() -> Any:
    return sd("SemanticStableDiffusionPipeline")


@case("StableDiffusionGLIGENPipeline", **SD, call={**SIZE, "gligen_phrases": ["cat"],
      "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]})  # fmt: skip
def _() -> Any:
    return sd("StableDiffusionGLIGENPipeline", unet=unet(attention_type="gated"))


@case("StableDiffusionControlNetXSPipeline", **SD, conditions=given())
def _() -> Any:
    net = unet(layers_per_block=2)
    adapter = df.ControlNetXSAdapter.from_unet(net, size_ratio=1, conditioning_embedding_out_channels=(2, 2))
    return sd("StableDiffusionControlNetXSPipeline", unet=net, controlnet=alive(adapter))


@case("StableDiffusionPipelineSafe", **SD, call=SIZE)
def _() -> Any:
    return sd("StableDiffusionPipelineSafe")


@case("StableDiffusionModelEditingPipeline", **SD, call=SIZE)
def _() -> Any:
    return sd("StableDiffusionModelEditingPipeline")


@case("StableDiffusionInpaintPipelineLegacy", **SD, call={"strength": 0.8}, conditions=INPAINT, steps=5, batch=1)
def _() -> Any:
    return sd("StableDiffusionInpaintPipelineLegacy")


@case("LDMTextToImagePipeline", **SD, call=SIZE)
def _() -> Any:
    return sd("LDMTextToImagePipeline", vqvae=kl(), bert=clip(length=77), tokenizer=tiny.tokenizer(77))


@case("LDMSuperResolutionPipeline", **SD, conditions=lambda count: {"image": torch.rand(count, 3, 8, 8) * 2 - 1})
def _() -> Any:
    vqvae = make(df.VQModel, block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
                 up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3, norm_num_groups=4)  # fmt: skip
    net = make(df.UNet2DModel, sample_size=8, in_channels=6, out_channels=3, layers_per_block=1, norm_num_groups=4,
               block_out_channels=(8, 16), attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
               up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return sd("LDMSuperResolutionPipeline", vqvae=vqvae, unet=net)


@case("PaintByExamplePipeline", **SD, call=SIZE, conditions=given(mask_image=masks, example_image=lambda n:
      pictures(n, 32)))  # fmt: skip
def _() -> Any:
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    encoder = make(PaintByExampleImageEncoder, config=vision().config, proj_size=16)
    return sd("PaintByExamplePipeline", 9, image_encoder=encoder, feature_extractor=image_processor())


@case("StableUnCLIPImg2ImgPipeline", **SD, call=SIZE, conditions=given(size=32))
def _() -> Any:
    return sd("StableUnCLIPImg2ImgPipeline", **unclip())


@case("StableUnCLIPPipeline", **SD, call={**SIZE, "prior_num_inference_steps": 2})
def _() -> Any:
    prior = make(df.PriorTransformer, num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16,
                 num_embeddings=8)  # fmt: skip
    scheduler = df.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
    )
    return sd("StableUnCLIPPipeline", prior=prior, prior_tokenizer=tiny.tokenizer(), prior_text_encoder=clip(True),
              prior_scheduler=scheduler, **unclip())  # fmt: skip


def unclip() -> dict[str, Any]:
    """What the unCLIP variants of Stable Diffusion 2 have beside it: embeddings of images as class labels."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return {
        "unet": unet(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        "image_encoder": vision(),
        "feature_extractor": image_processor(),
        "image_normalizer": make(StableUnCLIPImageNormalizer, embedding_dim=16),
        "image_noising_scheduler": df.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


@case("AnimateDiffPAGPipeline", family="AnimateDiff", call={**SIZE, "num_frames": 2})
def _() -> Any:
    return sd("AnimateDiffPAGPipeline", motion_adapter=motion(), pag_applied_layers=["mid"])


@case(
    "AnimateDiffVideoToVideoControlNetPipeline",
    family="AnimateDiff",
    conditions=lambda count: {"video": [pictures(2) for _ in range(count)]},
    call={"conditioning_frames": pictures(2)},
    steps=5,
    batch=1,
)
def _() -> Any:
    return sd("AnimateDiffVideoToVideoControlNetPipeline", motion_adapter=motion(), controlnet=control())


@case(
    "AnimateDiffSparseControlNetPipeline",
    family="AnimateDiff",
    call={**SIZE, "num_frames": 2, "conditioning_frames": pictures(1)},
    batch=1,
)
def _() -> Any:
    sparse = make(
        df.SparseControlNetModel,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
        motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(4, 8),
        motion_max_seq_length=32,
        use_simplified_condition_embedding=False,
        conditioning_channels=3,
    )
    return sd("AnimateDiffSparseControlNetPipeline", motion_adapter=motion(), controlnet=sparse)


@case("PIAPipeline", family="AnimateDiff", call={**SIZE, "num_frames": 2}, conditions=given(), batch=1)
def _() -> Any:
    adapter = make(
        df.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        conv_in_channels=9,
    )
    return sd("PIAPipeline", motion_adapter=adapter)
