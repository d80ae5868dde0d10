"""Tiny random instances of many pipeline classes of diffusers, built from configs: the rows of the matrix test.

Nothing comes from a hub; text encoders are real transformers classes of a few thousand parameters and tokenizers are
built here, one token per character. A :class:`Case` says how to make the pipeline and what to call it with: what a user
would write, and nothing about how it is trained.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers as df
import numpy as np
import tiny
import torch
import transformers as tf
from PIL import Image
from torch import nn

PROMPTS = ["a red cat", "two dog"]


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Attributes:
        build: makes the pipeline.
        family: the row's family, by which lines of quirk data are counted.
        call: fixed arguments of the call.
        conditions: per-sample arguments for a number of samples.
        steps: denoising steps.
        batch: samples per rollout.
        fast: whether the row belongs to the fast tests.
        refused: what the sampler says where the class cannot be trained.
    """

    build: Callable[[], Any]
    family: str
    call: Mapping[str, Any] = field(default_factory=dict)
    conditions: Callable[[int], dict[str, Any]] = lambda count: {}
    steps: int = 4
    batch: int = 2
    fast: bool = False
    refused: str = ""


CASES: dict[str, Case] = {}


def case(name: str, family: str, **settings: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the builder below as the row ``name``: a class name, with a variant in brackets if there are several."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = Case(build=build, family=family, **settings)
        return build

    return register


# -- conditions --------------------------------------------------------------------------------------------------


def pictures(count: int, size: int = 16, mode: str = "RGB") -> list[Image.Image]:
    """Different random pictures."""
    rng = np.random.default_rng(0)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode) for _ in range(count)]


def masks(count: int, size: int = 16) -> list[Image.Image]:
    """Masks whose right half is to be painted."""
    array = np.zeros((size, size), np.uint8)
    array[:, size // 2 :] = 255
    return [Image.fromarray(array, "L")] * count


def given(name: str = "image", size: int = 16, **more: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    """A picture per sample as the argument ``name``, and whatever else."""
    return lambda count: {name: pictures(count, size), **{key: make(count) for key, make in more.items()}}


# -- parts -------------------------------------------------------------------------------------------------------


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give the parameters that carry nothing before training small values, so that gradients flow.

    Zeros carry nothing, and neither does what diffusers leaves uninitialised (LuminaNextDiT2DModel's ``pad_token`` is
    ``torch.empty``: zeros in one process and 1e33 in the next). Each parameter has a seed of its own, so that one
    that happens to be filled does not change the others.
    """
    for index, parameter in enumerate(module.parameters()):
        size = parameter.detach().abs().max() if parameter.numel() else torch.zeros(())
        if not 1e-12 < size < 1e6:
            generator = torch.Generator().manual_seed(seed + index)
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def make(cls: Any, **config: Any) -> Any:
    """A model of ``cls`` with random weights, the same every time."""
    torch.manual_seed(0)
    return alive(cls(**config))


def letters(length: int = 16, padding: str = "right", cls: Any = tf.PreTrainedTokenizerFast) -> Any:
    """A tokenizer of one token per character, with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocab = ["<pad>", "</s>", "<unk>", "<s>", "<|im_end|>", *(chr(c) for c in range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tok = cls(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
        padding_side=padding,
    )
    tok.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    return tok


VOCAB = 128


def t5(width: int = 16, cls: Any = tf.T5EncoderModel, config: Any = tf.T5Config) -> Any:
    return make(
        cls,
        config=config(vocab_size=VOCAB, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0),
    )


def clip(projection: bool = False, width: int = 16, length: int = 8) -> Any:
    cls = tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel
    return make(cls, config=tiny._text_config(len(tiny.tokenizer()), width, length))


def language(cls: str, config: str, width: int = 16, layers: int = 3, **more: Any) -> Any:
    """A tiny decoder-only language model."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        **more,
    }
    return make(getattr(tf, cls), config=getattr(tf, config)(**settings))


def kl(channels: int = 4, **config: Any) -> Any:
    return alive(tiny.vae(channels, **config))


DDIM = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def ddim(**config: Any) -> Any:
    return df.DDIMScheduler(**{**DDIM, **config})


def flow(**config: Any) -> Any:
    return df.FlowMatchEulerDiscreteScheduler(**config)


def assemble(cls: Any, **parts: Any) -> Any:
    """A pipeline of ``cls`` from those of ``parts`` that its constructor takes; whatever else it wants is ``None``."""
    wanted = {
        name: parameter
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    chosen = {
        name: parts.get(name)
        for name, parameter in wanted.items()
        if name in parts or parameter.default is inspect.Parameter.empty
    }
    pipe = cls(**chosen)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- Stable Diffusion --------------------------------------------------------------------------------------------


def unet(channels: int = 4, **config: Any) -> Any:
    return make(
        df.UNet2DConditionModel,
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            **config,
        },
    )


def control(**config: Any) -> Any:
    return make(
        df.ControlNetModel,
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "conditioning_embedding_out_channels": (4, 8),
            **config,
        },
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


SIZE = {"height": 16, "width": 16}
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


INPAINT = given(mask_image=masks)


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


def adapter() -> Any:
    return make(
        df.T2IAdapter,
        in_channels=3,
        channels=[8, 16],
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type="full_adapter",
    )


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


# -- SDXL --------------------------------------------------------------------------------------------------------

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


# -- SD3 ---------------------------------------------------------------------------------------------------------


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
SHORT = {"max_sequence_length": 8}


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
    controlnet = make(
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
    )
    return sd3("StableDiffusion3ControlNetPipeline", controlnet=controlnet)


# -- Flux --------------------------------------------------------------------------------------------------------


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
TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "dog"}


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
    controlnet = make(
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
    return flux("FluxControlNetPipeline", controlnet=controlnet)


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


# -- further image transformers ----------------------------------------------------------------------------------


def pixart(cls: str, **parts: Any) -> Any:
    transformer = make(
        df.PixArtTransformer2DModel,
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return assemble(
        getattr(df, cls),
        **{
            "tokenizer": letters(),
            "text_encoder": t5(),
            "vae": kl(),
            "transformer": transformer,
            "scheduler": df.DPMSolverMultistepScheduler(),
            **parts,
        },
    )


PLAIN = {**SIZE, "clean_caption": False, "use_resolution_binning": False}


@case("PixArtAlphaPipeline", family="PixArt", call={**PLAIN, **SHORT})
def _() -> Any:
    return pixart("PixArtAlphaPipeline", scheduler=ddim())


@case("PixArtSigmaPipeline", family="PixArt", call={**PLAIN, **SHORT}, fast=True)
def _() -> Any:
    return pixart("PixArtSigmaPipeline")


@case("PixArtSigmaPAGPipeline", family="PixArt", call={**PLAIN, **SHORT})
def _() -> Any:
    return pixart("PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.1"])


def sana(cls: str, config: Mapping[str, Any] | None = None, **parts: Any) -> Any:
    vae = make(
        df.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = make(
        df.SanaTransformer2DModel,
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 16,
            "sample_size": 8,
            **(config or {}),
        },
    )
    return assemble(
        getattr(df, cls),
        **{
            "tokenizer": letters(),
            "text_encoder": language("Gemma2Model", "Gemma2Config", query_pre_attn_scalar=8),
            "vae": vae,
            "transformer": transformer,
            "scheduler": flow(shift=3.0),
            **parts,
        },
    )


SANA = {**PLAIN, "height": 32, "width": 32, "max_sequence_length": 16, "complex_human_instruction": None}


@case("SanaPipeline", family="Sana", call=SANA)
def _() -> Any:
    return sana("SanaPipeline")


@case("SanaPAGPipeline", family="Sana", call=SANA)
def _() -> Any:
    return sana("SanaPAGPipeline", pag_applied_layers=["blocks.0"])


@case("SanaSprintPipeline", family="Sana", call=SANA, steps=2)
def _() -> Any:
    config = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return sana("SanaSprintPipeline", config, scheduler=df.SCMScheduler())


@case("Lumina2Pipeline", family="Lumina", call={"height": 32, "width": 32, "max_sequence_length": 16})
def _() -> Any:
    transformer = make(
        df.Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 16, 16),
        cap_feat_dim=16,
    )
    return assemble(
        df.Lumina2Pipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=kl(shift_factor=0.0),
        text_encoder=language("Gemma2Model", "Gemma2Config", query_pre_attn_scalar=8),
        tokenizer=letters(),
    )


@case(
    "LuminaPipeline",
    family="Lumina",
    call={"height": 32, "width": 32, "max_sequence_length": 16, "clean_caption": False},
)
def _() -> Any:
    transformer = make(
        df.LuminaNextDiT2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
        qk_norm=True,
    )
    return assemble(
        df.LuminaPipeline,
        transformer=transformer,
        scheduler=flow(),
        vae=kl(),
        text_encoder=language("GemmaForCausalLM", "GemmaConfig"),
        tokenizer=letters(),
    )


@case("AuraFlowPipeline", family="AuraFlow", call={**SIZE, "max_sequence_length": 16})
def _() -> Any:
    transformer = make(
        df.AuraFlowTransformer2DModel,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=256,
    )
    return assemble(
        df.AuraFlowPipeline,
        tokenizer=letters(),
        text_encoder=t5(cls=tf.UMT5EncoderModel, config=tf.UMT5Config),
        vae=kl(),
        transformer=transformer,
        scheduler=flow(),
    )


def hunyuan_dit(cls: str, **parts: Any) -> Any:
    transformer = make(
        df.HunyuanDiT2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=24,
        text_len=77,
        text_len_t5=256,
    )
    bert = tf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    return assemble(
        getattr(df, cls),
        vae=kl(),
        text_encoder=make(tf.BertModel, config=bert),
        tokenizer=letters(77),
        text_encoder_2=t5(),
        tokenizer_2=letters(256),
        transformer=transformer,
        scheduler=df.DDPMScheduler(prediction_type="v_prediction", beta_end=0.018, beta_schedule="scaled_linear"),
        requires_safety_checker=False,
        **parts,
    )


@case("HunyuanDiTPipeline", family="HunyuanDiT", call={**SIZE, "use_resolution_binning": False})
def _() -> Any:
    return hunyuan_dit("HunyuanDiTPipeline")


@case("HunyuanDiTPAGPipeline", family="HunyuanDiT", call={**SIZE, "use_resolution_binning": False})
def _() -> Any:
    return hunyuan_dit("HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"])


@case("CogView3PlusPipeline", family="CogView", call={**SIZE, "max_sequence_length": 16})
def _() -> Any:
    transformer = make(
        df.CogView3PlusTransformer2DModel,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return assemble(
        df.CogView3PlusPipeline,
        tokenizer=letters(),
        text_encoder=t5(),
        vae=kl(),
        transformer=transformer,
        scheduler=df.CogVideoXDDIMScheduler(),
    )


@case("CogView4Pipeline", family="CogView", call={**SIZE, "max_sequence_length": 16})
def _() -> Any:
    transformer = make(
        df.CogView4Transformer2DModel,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    return assemble(
        df.CogView4Pipeline,
        tokenizer=letters(padding="left"),
        text_encoder=language("GlmModel", "GlmConfig", pad_token_id=0),
        vae=kl(),
        transformer=transformer,
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )


def qwen_image(cls: str, **parts: Any) -> Any:
    vae = make(
        df.AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = make(
        df.QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return assemble(
        getattr(df, cls),
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=language("Qwen3ForCausalLM", "Qwen3Config"),
        tokenizer=letters(512),
        transformer=transformer,
        **parts,
    )


@case("QwenImagePipeline", family="Qwen-Image", call={**SIZE, **TRUE_CFG, "max_sequence_length": 16})
def _() -> Any:
    return qwen_image("QwenImagePipeline")


@case(
    "QwenImageImg2ImgPipeline",
    family="Qwen-Image",
    call={**SIZE, **TRUE_CFG, "max_sequence_length": 16, "strength": 0.8},
    conditions=given(),
    steps=5,
)
def _() -> Any:
    return qwen_image("QwenImageImg2ImgPipeline")


@case(
    "QwenImageInpaintPipeline",
    family="Qwen-Image",
    call={**SIZE, **TRUE_CFG, "max_sequence_length": 16, "strength": 1.0},
    conditions=INPAINT,
)
def _() -> Any:
    return qwen_image("QwenImageInpaintPipeline")


def z_image(cls: str, **parts: Any) -> Any:
    transformer = make(
        df.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return assemble(
        getattr(df, cls),
        scheduler=flow(),
        vae=kl(shift_factor=0.0, scaling_factor=1.0),
        text_encoder=language("Qwen3Model", "Qwen3Config"),
        tokenizer=letters(64),
        transformer=transformer,
        **parts,
    )


@case("ZImagePipeline", family="Z-Image", call={**SIZE, "max_sequence_length": 32})
def _() -> Any:
    return z_image("ZImagePipeline")


@case(
    "ZImageImg2ImgPipeline",
    family="Z-Image",
    call={**SIZE, "max_sequence_length": 32, "strength": 0.8},
    conditions=given(),
    steps=5,
)
def _() -> Any:
    return z_image("ZImageImg2ImgPipeline")


@case("DiTPipeline", family="DiT", conditions=lambda count: {"class_labels": list(range(count))})
def _() -> Any:
    transformer = make(
        df.DiTTransformer2DModel,
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return assemble(df.DiTPipeline, transformer=transformer, vae=kl(), scheduler=ddim())


# -- unconditional and pixel models ------------------------------------------------------------------------------


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
    return deepfloyd(
        "IFSuperResolutionPipeline", 6, class_embed_type="timestep", image_noising_scheduler=df.DDPMScheduler()
    )


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


# -- Kandinsky, Stable Cascade -----------------------------------------------------------------------------------


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


def image_processor() -> Any:
    return tf.CLIPImageProcessor(crop_size=32, size=32)


def vision(width: int = 16) -> Any:
    config = tf.CLIPVisionConfig(
        hidden_size=width,
        image_size=32,
        projection_dim=width,
        intermediate_size=32,
        num_attention_heads=2,
        num_channels=3,
        num_hidden_layers=2,
        patch_size=16,
    )
    return make(tf.CLIPVisionModelWithProjection, config=config)


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


# -- video -------------------------------------------------------------------------------------------------------


def wan_vae() -> Any:
    return make(df.AutoencoderKLWan, base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def wan_transformer(**config: Any) -> Any:
    return make(
        df.WanTransformer3DModel,
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 16,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **config,
        },
    )


def wan(cls: str, **parts: Any) -> Any:
    # Wan cleans prompts by ftfy, in most files without asking whether it is installed.
    vars(sys.modules[getattr(df, cls).__module__]).setdefault("ftfy", SimpleNamespace(fix_text=lambda text: text))
    return assemble(
        getattr(df, cls),
        **{
            "tokenizer": letters(),
            "text_encoder": t5(cls=tf.UMT5EncoderModel, config=tf.UMT5Config),
            "vae": wan_vae(),
            "transformer": wan_transformer(),
            "scheduler": df.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            **parts,
        },
    )


WAN = {**SIZE, "num_frames": 5, "max_sequence_length": 16, "negative_prompt": "dog"}


@case("WanPipeline (2.1)", family="Wan", call=WAN)
def _() -> Any:
    return wan("WanPipeline")


@case("WanPipeline (2.2, two experts)", family="Wan", call=WAN)
def _() -> Any:
    return wan("WanPipeline", transformer_2=wan_transformer(), boundary_ratio=0.8)


@case("WanImageToVideoPipeline", family="Wan", call=WAN, conditions=given(), batch=1)
def _() -> Any:
    return wan("WanImageToVideoPipeline", transformer=wan_transformer(in_channels=36, image_dim=16),
               image_encoder=vision(), image_processor=image_processor())  # fmt: skip


@case(
    "WanVideoToVideoPipeline",
    family="Wan",
    call={**SIZE, "max_sequence_length": 16, "strength": 0.8},
    conditions=lambda count: {"video": [pictures(5) for _ in range(count)]},
    steps=5,
    batch=1,
)
def _() -> Any:
    return wan("WanVideoToVideoPipeline", scheduler=df.UniPCMultistepScheduler(flow_shift=3.0))


@case("SkyReelsV2Pipeline", family="SkyReels", call=WAN)
def _() -> Any:
    transformer = make(
        df.SkyReelsV2Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return wan("SkyReelsV2Pipeline", transformer=transformer)


def ltx(cls: str, **parts: Any) -> Any:
    vae = make(
        df.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    transformer = make(
        df.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )
    return assemble(
        getattr(df, cls),
        scheduler=flow(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=letters(),
        transformer=transformer,
        **parts,
    )


LTX = {"height": 32, "width": 32, "num_frames": 9, "frame_rate": 25, "max_sequence_length": 16}


@case("LTXPipeline", family="LTX", call=LTX)
def _() -> Any:
    return ltx("LTXPipeline")


@case("LTXImageToVideoPipeline", family="LTX", call=LTX, conditions=given(size=32))
def _() -> Any:
    return ltx("LTXImageToVideoPipeline")


@case("LTXConditionPipeline", family="LTX", call={**LTX, "image": pictures(1, 32)[0]})
def _() -> Any:
    return ltx("LTXConditionPipeline")


def cogvideox(cls: str, channels: int = 4, scheduler: Any = None) -> Any:
    vae = make(
        df.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = make(
        df.CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    return assemble(
        getattr(df, cls),
        tokenizer=letters(),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler or df.CogVideoXDDIMScheduler(),
    )


COG = {**SIZE, "num_frames": 8, "max_sequence_length": 16}


@case("CogVideoXPipeline (DDIM)", family="CogVideoX", call=COG)
def _() -> Any:
    return cogvideox("CogVideoXPipeline")


@case("CogVideoXPipeline (DPM)", family="CogVideoX", call=COG)
def _() -> Any:
    return cogvideox("CogVideoXPipeline", scheduler=df.CogVideoXDPMScheduler())


@case("CogVideoXImageToVideoPipeline", family="CogVideoX", call=COG, conditions=given(), batch=1)
def _() -> Any:
    return cogvideox("CogVideoXImageToVideoPipeline", channels=8)


@case(
    "CogVideoXVideoToVideoPipeline",
    family="CogVideoX",
    call={**SIZE, "max_sequence_length": 16, "strength": 0.8},
    conditions=lambda count: {"video": [pictures(8) for _ in range(count)]},
    steps=5,
    batch=1,
)
def _() -> Any:
    return cogvideox("CogVideoXVideoToVideoPipeline")


def hunyuan_video(cls: str, **parts: Any) -> Any:
    vae = make(
        df.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )
    transformer = make(
        df.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    return assemble(
        getattr(df, cls),
        text_encoder=language("LlamaModel", "LlamaConfig"),
        tokenizer=letters(512),
        text_encoder_2=clip(length=77),
        tokenizer_2=tiny.tokenizer(77),
        transformer=transformer,
        vae=vae,
        scheduler=flow(shift=7.0),
        **parts,
    )


TEMPLATE = {"template": "describe: {}", "crop_start": 10}


@case(
    "HunyuanVideoPipeline",
    family="HunyuanVideo",
    call={**SIZE, "num_frames": 5, "prompt_template": TEMPLATE, "max_sequence_length": 16},
)
def _() -> Any:
    return hunyuan_video("HunyuanVideoPipeline")


@case("MochiPipeline", family="Mochi", call={**SIZE, "num_frames": 7, "max_sequence_length": 16})
def _() -> Any:
    vae = make(
        df.AutoencoderKLMochi,
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = make(
        df.MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    return assemble(
        df.MochiPipeline,
        scheduler=flow(num_train_timesteps=1000, invert_sigmas=True),
        vae=vae,
        text_encoder=t5(),
        tokenizer=letters(),
        transformer=transformer,
        force_zeros_for_empty_prompt=False,
    )


@case(
    "AllegroPipeline",
    family="Allegro",
    call={**SIZE, "num_frames": 8, "max_sequence_length": 16, "clean_caption": False},
)
def _() -> Any:
    vae = make(
        df.AutoencoderKLAllegro,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = make(
        df.AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=16,
    )
    vae.enable_tiling()
    return assemble(
        df.AllegroPipeline,
        tokenizer=letters(),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer,
        scheduler=df.EulerAncestralDiscreteScheduler(),
    )


@case(
    "LattePipeline",
    family="Latte",
    call={**SIZE, "video_length": 2, "clean_caption": False},
)
def _() -> Any:
    transformer = make(
        df.LatteTransformer3DModel,
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    return assemble(
        df.LattePipeline,
        tokenizer=letters(120),
        text_encoder=t5(),
        vae=kl(),
        transformer=transformer,
        scheduler=ddim(),
    )


@case("StableVideoDiffusionPipeline", family="Stable Video Diffusion", call={**SIZE, "num_frames": 2},
      conditions=given(size=32))  # fmt: skip
def _() -> Any:
    net = make(
        df.UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        layers_per_block=1,
        sample_size=8,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48,
    )
    vae = make(
        df.AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        sample_size=16,
    )
    config = tf.CLIPVisionConfig(
        hidden_size=16, image_size=224, projection_dim=16, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=1, patch_size=112,
    )  # fmt: skip
    return assemble(
        df.StableVideoDiffusionPipeline,
        vae=vae,
        image_encoder=make(tf.CLIPVisionModelWithProjection, config=config),
        unet=net,
        scheduler=df.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=tf.CLIPImageProcessor(crop_size=224, size=224),
    )


# -- audio -------------------------------------------------------------------------------------------------------


@case("StableAudioPipeline", family="Stable Audio", call={"audio_end_in_s": 2.0})
def _() -> Any:
    vae = make(
        df.AutoencoderOobleck,
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=3,
        audio_channels=2,
        sampling_rate=4,
    )
    transformer = make(
        df.StableAudioDiTModel,
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    projection = make(
        df.StableAudioProjectionModel, text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
    )
    return assemble(
        df.StableAudioPipeline,
        vae=vae,
        text_encoder=t5(),
        projection_model=projection,
        tokenizer=letters(8),
        transformer=transformer,
        scheduler=df.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )


# -- classes that cannot be trained ------------------------------------------------------------------------------


@case("LTX2Pipeline", family="LTX", refused="steps copies of its scheduler")
def _() -> Any:
    return refused("LTX2Pipeline")


@case("SkyReelsV2DiffusionForcingPipeline", family="SkyReels", refused="steps copies of its scheduler")
def _() -> Any:
    return refused("SkyReelsV2DiffusionForcingPipeline")


@case("HeliosPipeline", family="Helios", refused="growing stages of latents")
def _() -> Any:
    return refused("HeliosPipeline")


@case("ShapEPipeline", family="Shap-E", refused="scheduler HeunDiscreteScheduler: its steps are not single Gaussian")
def _() -> Any:
    return refused("ShapEPipeline", df.HeunDiscreteScheduler())


@case("LLaDA2Pipeline", family="LLaDA", refused="samples discrete tokens")
def _() -> Any:
    return refused("LLaDA2Pipeline")


def refused(name: str, scheduler: Any = None) -> Any:
    """A stand-in by the class's name: refusals look at the class and the scheduler, before anything runs."""
    pipe = type(name, (tiny.sd_pipeline().__class__,), {})(**tiny.sd_pipeline().components)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe
