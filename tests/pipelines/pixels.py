"""Unconditional and pixel models, and maps predicted by Stable Diffusion (Marigold)."""

from __future__ import annotations

from typing import Any

import diffusers as df

from pipelines.parts import assemble, case, given, letters, make, masks, pictures, t5, unet
from pipelines.stable_diffusion import sd


def unconditional(**config: Any) -> Any:
    return make(
        df.UNet2DModel,
        **{
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **config,
        },
    )


@case("DDPMPipeline", family="Unconditional")
def _() -> Any:
    return assemble(df.DDPMPipeline, unet=unconditional(), scheduler=df.DDPMScheduler())


@case("DDIMPipeline", family="Unconditional")
def _() -> Any:
    return assemble(df.DDIMPipeline, unet=unconditional(), scheduler=df.DDIMScheduler())


@case("PNDMPipeline", family="Unconditional")
def _() -> Any:
    return assemble(df.PNDMPipeline, unet=unconditional(), scheduler=df.PNDMScheduler(skip_prk_steps=True))


@case("LDMPipeline", family="Unconditional")
def _() -> Any:
    vqvae = make(df.VQModel, block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
                 up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3, norm_num_groups=4)  # fmt: skip
    return assemble(df.LDMPipeline, vqvae=vqvae, unet=unconditional(), scheduler=df.DDIMScheduler())


@case("ConsistencyModelPipeline", family="Unconditional")
def _() -> Any:
    return assemble(
        df.ConsistencyModelPipeline,
        unet=unconditional(),
        scheduler=df.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0),
    )


@case("IFPipeline", family="DeepFloyd IF", call={"clean_caption": False, "height": 8, "width": 8})
def _() -> Any:
    return deepfloyd("IFPipeline")


@case("IFImg2ImgPipeline", family="DeepFloyd IF", call={"clean_caption": False, "strength": 0.8},
      conditions=given(size=8), steps=5)  # fmt: skip
def _() -> Any:
    return deepfloyd("IFImg2ImgPipeline")


@case("IFInpaintingPipeline", family="DeepFloyd IF", call={"clean_caption": False, "strength": 1.0},
      conditions=lambda count: {"image": pictures(count, 8), "mask_image": masks(count, 8)})  # fmt: skip
def _() -> Any:
    return deepfloyd("IFInpaintingPipeline")


@case("IFSuperResolutionPipeline", family="DeepFloyd IF", call={"clean_caption": False, "height": 8, "width": 8},
      conditions=given(size=8))  # fmt: skip
def _() -> Any:
    return superresolution("IFSuperResolutionPipeline")


@case("IFImg2ImgSuperResolutionPipeline", family="DeepFloyd IF", call={"clean_caption": False, "strength": 0.8},
      conditions=given(size=8, original_image=lambda count: pictures(count, 16)), steps=5)  # fmt: skip
def _() -> Any:
    return superresolution("IFImg2ImgSuperResolutionPipeline")


@case("IFInpaintingSuperResolutionPipeline", family="DeepFloyd IF", call={"clean_caption": False, "strength": 0.8},
      conditions=given(size=8, original_image=pictures, mask_image=masks), steps=5)  # fmt: skip
def _() -> Any:
    return superresolution("IFInpaintingSuperResolutionPipeline")


def superresolution(cls: str) -> Any:
    return deepfloyd(cls, 6, class_embed_type="timestep", image_noising_scheduler=df.DDPMScheduler())


def deepfloyd(cls: str, channels: int = 3, class_embed_type: str | None = None, **parts: Any) -> Any:
    net = unet(
        channels,
        class_embed_type=class_embed_type,
        out_channels=6,
        block_out_channels=(32, 64),
        norm_num_groups=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        cross_attention_dim=32,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = df.DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2", thresholding=True)
    return assemble(
        getattr(df, cls),
        tokenizer=letters(77),
        text_encoder=t5(),
        unet=net,
        scheduler=scheduler,
        requires_safety_checker=False,
        **parts,
    )


@case("MarigoldNormalsPipeline", family="Marigold", call={"processing_resolution": 0}, conditions=given())
def _() -> Any:
    return sd("MarigoldNormalsPipeline", 8, prediction_type="normals", use_full_z_range=True)


@case("MarigoldDepthPipeline", family="Marigold", call={"processing_resolution": 0}, conditions=given())
def _() -> Any:
    return sd("MarigoldDepthPipeline", 8, prediction_type="depth", scale_invariant=True, shift_invariant=True)
