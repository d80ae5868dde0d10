"""Flux, Flux 2, Chroma and Bria."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny

from pipelines.parts import (
    INPAINT,
    SHORT,
    SIZE,
    TRUE_CFG,
    assemble,
    case,
    clip,
    flow,
    given,
    kl,
    language,
    letters,
    make,
    masks,
    pictures,
    t5,
)


def flux(cls: str, channels: int = 16, guided: bool = False, **parts: Any) -> Any:
    return assemble(
        getattr(df, cls),
        **{
            "scheduler": flow(use_dynamic_shifting=True),
            "vae": kl(4, shift_factor=0.0, scaling_factor=1.0),
            "text_encoder": clip(),
            "tokenizer": tiny.tokenizer(),
            "text_encoder_2": t5(),
            "tokenizer_2": letters(),
            "transformer": make(
                df.FluxTransformer2DModel,
                in_channels=channels,
                out_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guided,
            ),
            **parts,
        },
    )


FLUX = {"family": "Flux"}


@case("FluxPipeline (guidance-distilled)", **FLUX, call={**SIZE, **SHORT}, fast=True)
def _() -> Any:
    return flux("FluxPipeline", guided=True)


@case("FluxPipeline (true CFG)", **FLUX, call={**SIZE, **SHORT, **TRUE_CFG})
def _() -> Any:
    return flux("FluxPipeline")


@case("FluxImg2ImgPipeline", **FLUX, call={**SIZE, **SHORT, "strength": 0.8}, conditions=given(), steps=5)
def _() -> Any:
    return flux("FluxImg2ImgPipeline")


@case("FluxInpaintPipeline", **FLUX, call={**SIZE, **SHORT, "strength": 1.0}, conditions=INPAINT)
def _() -> Any:
    return flux("FluxInpaintPipeline")


@case("FluxFillPipeline", **FLUX, call={**SIZE, **SHORT}, conditions=INPAINT)
def _() -> Any:
    return flux("FluxFillPipeline", 16 + 16 + 16, guided=True)


@case(
    "FluxKontextPipeline",
    **FLUX,
    call={**SIZE, **SHORT, "max_area": 256, "_auto_resize": False},
    conditions=given(),
    fast=True,
)
def _() -> Any:
    return flux("FluxKontextPipeline", guided=True)


@case("FluxControlPipeline", **FLUX, call={**SIZE, **SHORT}, conditions=given("control_image"))
def _() -> Any:
    return flux("FluxControlPipeline", 32)


@case("FluxControlNetPipeline", **FLUX, call={**SIZE, **SHORT}, conditions=given("control_image"))
def _() -> Any:
    return flux("FluxControlNetPipeline", controlnet=flux_control())


def flux_control() -> Any:
    return make(
        df.FluxControlNetModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )


@case(
    "FluxControlImg2ImgPipeline",
    **FLUX,
    call={**SIZE, **SHORT, "strength": 0.8},
    conditions=given(control_image=pictures),
    steps=5,
)
def _() -> Any:
    return flux("FluxControlImg2ImgPipeline", 32)


@case(
    "FluxKontextInpaintPipeline",
    **FLUX,
    call={**SIZE, **SHORT, "max_area": 256, "_auto_resize": False},
    conditions=INPAINT,
)
def _() -> Any:
    return flux("FluxKontextInpaintPipeline", guided=True)


def flux2(cls: str, text: Any, **parts: Any) -> Any:
    vae = make(
        df.AutoencoderKLFlux2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=16,
    )
    transformer = make(
        df.Flux2Transformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return assemble(
        getattr(df, cls),
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text,
        tokenizer=letters(64),
        transformer=transformer,
        **parts,
    )


FLUX2 = {**SIZE, "max_sequence_length": 32, "text_encoder_out_layers": (1,)}


@case("Flux2Pipeline", **FLUX, call=FLUX2)
def _() -> Any:
    return flux2("Flux2Pipeline", language("MistralForCausalLM", "MistralConfig"))


@case("Flux2KleinPipeline", **FLUX, call=FLUX2)
def _() -> Any:
    return flux2("Flux2KleinPipeline", language("Qwen3ForCausalLM", "Qwen3Config"), is_distilled=False)


@case(
    "Flux2KleinPipeline (reference image)",
    **FLUX,
    call={**FLUX2, "height": 64, "width": 64, "image": pictures(1, 64)},
)
def _() -> Any:
    return flux2("Flux2KleinPipeline", language("Qwen3ForCausalLM", "Qwen3Config"), is_distilled=False)


@case("ChromaPipeline", family="Chroma", call={**SIZE, **SHORT, "negative_prompt": "dog"})
def _() -> Any:
    return chroma("ChromaPipeline")


@case(
    "ChromaImg2ImgPipeline",
    family="Chroma",
    call={**SIZE, **SHORT, "negative_prompt": "dog", "strength": 0.8},
    conditions=given(),
    steps=5,
)
def _() -> Any:
    return chroma("ChromaImg2ImgPipeline")


def chroma(cls: str) -> Any:
    transformer = make(
        df.ChromaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return flux(cls, text_encoder=t5(), tokenizer=letters(), transformer=transformer)


@case("BriaPipeline", family="Bria", call={**SIZE, "negative_prompt": "dog", "max_sequence_length": 16})
def _() -> Any:
    transformer = make(
        df.BriaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[0, 8, 8],
    )
    return flux("BriaPipeline", text_encoder=t5(), tokenizer=letters(), transformer=transformer)


@case("FluxControlInpaintPipeline", **FLUX, call={**SIZE, **SHORT, "strength": 1.0},
      conditions=given(mask_image=masks, control_image=pictures))  # fmt: skip
def _() -> Any:
    return flux("FluxControlInpaintPipeline", 32)


@case("FluxControlNetImg2ImgPipeline", **FLUX, call={**SIZE, **SHORT, "strength": 0.8},
      conditions=given(control_image=pictures), steps=5)  # fmt: skip
def _() -> Any:
    return flux("FluxControlNetImg2ImgPipeline", controlnet=flux_control())


@case("FluxControlNetInpaintPipeline", **FLUX, call={**SIZE, **SHORT, "strength": 1.0},
      conditions=given(mask_image=masks, control_image=pictures))  # fmt: skip
def _() -> Any:
    return flux("FluxControlNetInpaintPipeline", controlnet=flux_control())


@case("Flux2KleinInpaintPipeline", **FLUX, call={**FLUX2, "strength": 1.0}, conditions=INPAINT, batch=1)
def _() -> Any:
    return flux2("Flux2KleinInpaintPipeline", language("Qwen3ForCausalLM", "Qwen3Config"), is_distilled=False)


@case("Flux2KleinKVPipeline", **FLUX, call=FLUX2)
def _() -> Any:
    return flux2("Flux2KleinKVPipeline", language("Qwen3ForCausalLM", "Qwen3Config"), is_distilled=True)


@case("OvisImagePipeline", family="Ovis-Image", call={**SIZE, "max_sequence_length": 16, "negative_prompt": "dog"})
def _() -> Any:
    transformer = make(
        df.OvisImageTransformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return flux(
        "OvisImagePipeline",
        text_encoder=language("Qwen3Model", "Qwen3Config"),
        tokenizer=letters(512),
        transformer=transformer,
    )


@case("LongCatImagePipeline", family="LongCat-Image", call={**SIZE, "enable_prompt_rewrite": False})
def _() -> Any:
    transformer = make(
        df.LongCatImageTransformer2DModel,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    return flux(
        "LongCatImagePipeline",
        vae=kl(16, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=language("Qwen3ForCausalLM", "Qwen3Config"),
        tokenizer=letters(1024),
        text_processor=None,
        transformer=transformer,
    )
