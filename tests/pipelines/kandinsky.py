"""Kandinsky, Stable Cascade and their priors."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny
import torch
from torch import nn

from pipelines.parts import (
    VOCAB,
    assemble,
    case,
    clip,
    given,
    image_processor,
    letters,
    make,
    masks,
    pictures,
    t5,
    unet,
    vision,
)


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
    return kandinsky("KandinskyV22CombinedPipeline", **prior_parts(kandinsky_prior()))


def prior_parts(prior: Any) -> dict[str, Any]:
    """The components of a prior, as a combined pipeline takes them."""
    return {f"prior_{name}": part for name, part in prior.components.items()}


def hints(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@case("KandinskyV22ControlnetPipeline", family="Kandinsky 2.2", call=KANDINSKY,
      conditions=lambda count: {**embeddings(count), "hint": hints(count)})  # fmt: skip
def _() -> Any:
    return kandinsky("KandinskyV22ControlnetPipeline", hinted())


@case("KandinskyV22ControlnetImg2ImgPipeline", family="Kandinsky 2.2", call={**KANDINSKY, "strength": 0.8},
      conditions=lambda count: {**embeddings(count), "image": pictures(count, 32), "hint": hints(count)},
      steps=5)  # fmt: skip
def _() -> Any:
    return kandinsky("KandinskyV22ControlnetImg2ImgPipeline", hinted())


def hinted() -> dict[str, Any]:
    return {"in_channels": 8, "addition_embed_type": "image_hint"}


@case("KandinskyV22InpaintPipeline", family="Kandinsky 2.2", call=KANDINSKY,
      conditions=lambda count: {**embeddings(count), "image": pictures(count, 32), "mask_image": masks(count, 32)},
      batch=1)  # fmt: skip
def _() -> Any:
    return kandinsky("KandinskyV22InpaintPipeline", {"in_channels": 9})


@case("KandinskyV22Img2ImgCombinedPipeline", family="Kandinsky 2.2",
      call={**KANDINSKY, "prior_num_inference_steps": 2, "strength": 0.8}, conditions=given(size=32),
      steps=5)  # fmt: skip
def _() -> Any:
    return kandinsky("KandinskyV22Img2ImgCombinedPipeline", **prior_parts(kandinsky_prior()))


@case("KandinskyV22InpaintCombinedPipeline", family="Kandinsky 2.2",
      call={**KANDINSKY, "prior_num_inference_steps": 2},
      conditions=given(size=32, mask_image=lambda count: masks(count, 32)), batch=1)  # fmt: skip
def _() -> Any:
    return kandinsky("KandinskyV22InpaintCombinedPipeline", {"in_channels": 9}, **prior_parts(kandinsky_prior()))


@case("KandinskyV22PriorEmb2EmbPipeline", family="Kandinsky 2.2", call={"strength": 0.8},
      conditions=given(size=32), steps=5, batch=1)  # fmt: skip
def _() -> Any:
    return kandinsky_prior("KandinskyV22PriorEmb2EmbPipeline")


@case("KandinskyPipeline", family="Kandinsky 2.1", call=KANDINSKY, conditions=embeddings)
def _() -> Any:
    return kandinsky21("KandinskyPipeline")


@case("KandinskyImg2ImgPipeline", family="Kandinsky 2.1", call={**KANDINSKY, "strength": 0.8},
      conditions=lambda count: {**embeddings(count), "image": pictures(count, 32)}, steps=5)  # fmt: skip
def _() -> Any:
    return kandinsky21("KandinskyImg2ImgPipeline")


@case("KandinskyInpaintPipeline", family="Kandinsky 2.1", call=KANDINSKY,
      conditions=lambda count: {**embeddings(count), "image": pictures(count, 32), "mask_image": masks(count, 32)},
      batch=1)  # fmt: skip
def _() -> Any:
    return kandinsky21("KandinskyInpaintPipeline", {"in_channels": 9})


@case("KandinskyPriorPipeline", family="Kandinsky 2.1")
def _() -> Any:
    return kandinsky_prior("KandinskyPriorPipeline")


@case("KandinskyCombinedPipeline", family="Kandinsky 2.1", call={**KANDINSKY, "prior_num_inference_steps": 2})
def _() -> Any:
    return kandinsky21("KandinskyCombinedPipeline", **prior_parts(kandinsky_prior("KandinskyPriorPipeline")))


@case("KandinskyImg2ImgCombinedPipeline", family="Kandinsky 2.1",
      call={**KANDINSKY, "prior_num_inference_steps": 2, "strength": 0.8}, conditions=given(size=32),
      steps=5)  # fmt: skip
def _() -> Any:
    return kandinsky21("KandinskyImg2ImgCombinedPipeline", **prior_parts(kandinsky_prior("KandinskyPriorPipeline")))


@case("KandinskyInpaintCombinedPipeline", family="Kandinsky 2.1",
      call={**KANDINSKY, "prior_num_inference_steps": 2},
      conditions=given(size=32, mask_image=lambda count: masks(count, 32)), batch=1)  # fmt: skip
def _() -> Any:
    prior = prior_parts(kandinsky_prior("KandinskyPriorPipeline"))
    return kandinsky21("KandinskyInpaintCombinedPipeline", {"in_channels": 9}, **prior)


def kandinsky21(cls: str, config: dict[str, Any] | None = None, **parts: Any) -> Any:
    """Kandinsky 2.1 beside 2.2: the prompt is given to the UNet too."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    settings = MCLIPConfig(
        transformerDimSize=16, imageDimSize=16, vocab_size=VOCAB, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    net = {
        "addition_embed_type": "text_image",
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": 16,
        "cross_attention_dim": 16,
        **(config or {}),
    }
    encoder = make(MultilingualCLIP, config=settings)
    return kandinsky(cls, net, text_encoder=encoder, tokenizer=letters(77), **parts)


def kandinsky(cls: str, config: dict[str, Any] | None = None, **parts: Any) -> Any:
    settings: dict[str, Any] = {"in_channels": 4, **(config or {})}
    net = unet(
        settings.pop("in_channels"),
        out_channels=8,
        block_out_channels=(32, 64),
        norm_num_groups=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        **{
            "addition_embed_type": "image",
            "encoder_hid_dim": 16,
            "encoder_hid_dim_type": "image_proj",
            **settings,
        },
    )
    scheduler = df.DDPMScheduler(variance_type="learned_range", beta_schedule="linear")
    return assemble(getattr(df, cls), **{"unet": net, "scheduler": scheduler, "movq": movq(), **parts})


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


def kandinsky_prior(cls: str = "KandinskyV22PriorPipeline") -> Any:
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
        getattr(df, cls),
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
    return kandinsky3("Kandinsky3Pipeline")


@case("Kandinsky3Img2ImgPipeline", family="Kandinsky 3", call={"strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return kandinsky3("Kandinsky3Img2ImgPipeline")


def kandinsky3(cls: str) -> Any:
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
        getattr(df, cls), tokenizer=letters(128), text_encoder=t5(), unet=net, scheduler=scheduler, movq=movq()
    )


@case("StableCascadePriorPipeline", family="Stable Cascade", call={"height": 128, "width": 128})
def _() -> Any:
    return cascade_prior()


def cascade_prior() -> Any:
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
    return cascade_decoder("StableCascadeDecoderPipeline")


@case("StableCascadeCombinedPipeline", family="Stable Cascade",
      call={"height": 128, "width": 128, "prior_num_inference_steps": 2})  # fmt: skip
def _() -> Any:
    return cascade_decoder("StableCascadeCombinedPipeline", 16, **prior_parts(cascade_prior()))


def cascade_decoder(cls: str, embedded: int = 4, **parts: Any) -> Any:
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
        effnet_in_channels=embedded,
        pixel_mapper_in_channels=3,
        dropout=(0.0, 0.0),
        timestep_conditioning_type=("sca",),
    )
    vqgan = make(df.PaellaVQModel if hasattr(df, "PaellaVQModel") else paella(), num_vq_embeddings=8, latent_channels=4,
                 bottleneck_blocks=1, embed_dim=8)  # fmt: skip
    return assemble(
        getattr(df, cls),
        decoder=decoder,
        tokenizer=tiny.tokenizer(),
        text_encoder=clip(True),
        scheduler=df.DDPMWuerstchenScheduler(),
        vqgan=vqgan,
        latent_dim_scale=4.0,
        **parts,
    )


@case("WuerstchenPriorPipeline", family="Wuerstchen", call={"height": 128, "width": 128})
def _() -> Any:
    return wuerstchen_prior()


def wuerstchen_prior() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    return assemble(
        df.WuerstchenPriorPipeline,
        prior=make(WuerstchenPrior, c_in=2, c=8, depth=2, c_cond=16, c_r=8, nhead=2),
        tokenizer=tiny.tokenizer(),
        text_encoder=clip(),
        scheduler=df.DDPMWuerstchenScheduler(),
    )


def paella() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    return PaellaVQModel
