"""Kandinsky, Stable Cascade and their priors."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny
import torch
from torch import nn

from pipelines.parts import assemble, case, clip, image_processor, letters, make, pictures, t5, unet, vision


def embeddings(count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image_embeds": torch.randn(count, 16, generator=generator),
        "negative_image_embeds": torch.randn(count, 16, generator=generator),
    }


KANDINSKY = {"height": 32, "width": 32}


@case("KandinskyV22Pipeline", family="Kandinsky 2.2", call=KANDINSKY, conditions=embeddings)
def _() -> Any:
    return kandinsky("KandinskyV22Pipeline")


@case(
    "KandinskyV22Img2ImgPipeline",
    family="Kandinsky 2.2",
    call={**KANDINSKY, "strength": 0.8},
    conditions=lambda count: {**embeddings(count), "image": pictures(count, 32)},
    steps=5,
)
def _() -> Any:
    return kandinsky("KandinskyV22Img2ImgPipeline")


@case("KandinskyV22CombinedPipeline", family="Kandinsky 2.2", call={**KANDINSKY, "prior_num_inference_steps": 2})
def _() -> Any:
    prior = kandinsky_prior().components
    return kandinsky("KandinskyV22CombinedPipeline", **{f"prior_{name}": part for name, part in prior.items()})


def kandinsky(cls: str, **parts: Any) -> Any:
    net = unet(
        out_channels=8,
        block_out_channels=(32, 64),
        norm_num_groups=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = df.DDPMScheduler(variance_type="learned_range", beta_schedule="linear")
    return assemble(getattr(df, cls), unet=net, scheduler=scheduler, movq=movq(), **parts)


def movq() -> Any:
    return make(
        df.VQModel,
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["AttnUpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )


@case("KandinskyV22PriorPipeline", family="Kandinsky 2.2")
def _() -> Any:
    return kandinsky_prior()


def kandinsky_prior() -> Any:
    prior = make(
        df.PriorTransformer,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=16,
        num_embeddings=8,
    )
    prior.clip_std = nn.Parameter(torch.ones(1, 16))
    return assemble(
        df.KandinskyV22PriorPipeline,
        prior=prior,
        image_encoder=vision(),
        text_encoder=clip(True),
        tokenizer=tiny.tokenizer(),
        scheduler=df.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_processor=image_processor(),
    )


@case("Kandinsky3Pipeline", family="Kandinsky 3", call={"height": 16, "width": 16})
def _() -> Any:
    net = make(
        df.Kandinsky3UNet,
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 8),
        cross_attention_dim=16,
        encoder_hid_dim=16,
    )
    scheduler = df.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=False)
    return assemble(
        df.Kandinsky3Pipeline, tokenizer=letters(128), text_encoder=t5(), unet=net, scheduler=scheduler, movq=movq()
    )


@case("StableCascadePriorPipeline", family="Stable Cascade", call={"height": 128, "width": 128})
def _() -> Any:
    prior = make(
        df.StableCascadeUNet,
        conditioning_dim=8,
        block_out_channels=(8, 8),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        clip_image_in_channels=16,
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        dropout=(0.0, 0.0),
    )
    return assemble(
        df.StableCascadePriorPipeline,
        tokenizer=tiny.tokenizer(),
        text_encoder=clip(True),
        prior=prior,
        scheduler=df.DDPMWuerstchenScheduler(),
        resolution_multiple=42.67,
    )


@case(
    "StableCascadeDecoderPipeline",
    family="Stable Cascade",
    conditions=lambda count: {"image_embeddings": torch.linspace(-1, 1, count * 64).view(count, 4, 4, 4)},
)
def _() -> Any:
    decoder = make(
        df.StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(8, 8),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        switch_level=(False,),
        clip_text_pooled_in_channels=16,
        effnet_in_channels=4,
        pixel_mapper_in_channels=3,
        dropout=(0.0, 0.0),
        timestep_conditioning_type=("sca",),
    )
    vqgan = make(df.PaellaVQModel if hasattr(df, "PaellaVQModel") else paella(), num_vq_embeddings=8, latent_channels=4,
                 bottleneck_blocks=1, embed_dim=8)  # fmt: skip
    return assemble(
        df.StableCascadeDecoderPipeline,
        decoder=decoder,
        tokenizer=tiny.tokenizer(),
        text_encoder=clip(True),
        scheduler=df.DDPMWuerstchenScheduler(),
        vqgan=vqgan,
        latent_dim_scale=4.0,
    )


def paella() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    return PaellaVQModel
