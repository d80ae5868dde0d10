"""Further image transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers as df
import tiny
import transformers as tf

from pipelines.parts import (
    INPAINT,
    SHORT,
    SIZE,
    TRUE_CFG,
    VOCAB,
    assemble,
    case,
    clip,
    ddim,
    flow,
    given,
    kl,
    language,
    letters,
    make,
    masks,
    pictures,
    t5,
    without_ftfy,
)


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


def hunyuan_dit(cls: str, layers: int = 2, **parts: Any) -> Any:
    transformer = make(
        df.HunyuanDiT2DModel,
        sample_size=8,
        num_layers=layers,
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
    return cogview4("CogView4Pipeline")


def cogview4(cls: str, channels: int = 4) -> Any:
    transformer = make(
        df.CogView4Transformer2DModel,
        in_channels=channels,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    return assemble(
        getattr(df, cls),
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


@case("QwenImageControlNetPipeline", family="Qwen-Image", call={**SIZE, **TRUE_CFG, "max_sequence_length": 16},
      conditions=given("control_image"))  # fmt: skip
def _() -> Any:
    return qwen_image("QwenImageControlNetPipeline", controlnet=qwen_control())


@case("QwenImageControlNetInpaintPipeline", family="Qwen-Image",
      call={**SIZE, **TRUE_CFG, "max_sequence_length": 16},
      conditions=given("control_image", control_mask=masks))  # fmt: skip
def _() -> Any:
    return qwen_image("QwenImageControlNetInpaintPipeline", controlnet=qwen_control(extra_condition_channels=4))


def qwen_control(**config: Any) -> Any:
    return make(
        df.QwenImageControlNetModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **config,
    )


@case("ZImageInpaintPipeline", family="Z-Image", call={**SIZE, "max_sequence_length": 32, "strength": 1.0},
      conditions=INPAINT)  # fmt: skip
def _() -> Any:
    return z_image("ZImageInpaintPipeline")


@case("ZImageControlNetPipeline", family="Z-Image", call={**SIZE, "max_sequence_length": 32},
      conditions=given("control_image"))  # fmt: skip
def _() -> Any:
    return z_image("ZImageControlNetPipeline", controlnet=z_control(4))


@case("ZImageControlNetInpaintPipeline", family="Z-Image", call={**SIZE, "max_sequence_length": 32},
      conditions=given(mask_image=masks, control_image=pictures))  # fmt: skip
def _() -> Any:
    return z_image("ZImageControlNetInpaintPipeline", controlnet=z_control(9))


def z_control(channels: int) -> Any:
    return make(
        df.ZImageControlNetModel,
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )


@case("SanaControlNetPipeline", family="Sana", call=SANA, conditions=given("control_image", size=32))
def _() -> Any:
    controlnet = make(
        df.SanaControlNetModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    )
    return sana("SanaControlNetPipeline", {"num_layers": 2}, controlnet=controlnet)


@case(
    "SanaSprintImg2ImgPipeline",
    family="Sana",
    call={**SANA, "strength": 1.0, "intermediate_timesteps": None},
    conditions=given(size=32),
)
def _() -> Any:
    config = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return sana("SanaSprintImg2ImgPipeline", config, scheduler=df.SCMScheduler())


@case("HunyuanDiTControlNetPipeline", family="HunyuanDiT", call={**SIZE, "use_resolution_binning": False},
      conditions=given("control_image"))  # fmt: skip
def _() -> Any:
    controlnet = make(
        df.HunyuanDiT2DControlNetModel,
        sample_size=8,
        transformer_num_layers=4,
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
    return hunyuan_dit("HunyuanDiTControlNetPipeline", 4, controlnet=controlnet)


@case("CogView4ControlPipeline", family="CogView", call={**SIZE, "max_sequence_length": 16},
      conditions=given("control_image"))  # fmt: skip
def _() -> Any:
    return cogview4("CogView4ControlPipeline", 8)


@case("HiDreamImagePipeline", family="HiDream", call={**SIZE, "max_sequence_length": 8})
def _() -> Any:
    transformer = make(
        df.HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 16],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    pipe = assemble(
        df.HiDreamImagePipeline,
        scheduler=flow(),
        vae=kl(shift_factor=0.0),
        text_encoder=clip(True),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=tiny.tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=letters(),
        text_encoder_4=language("LlamaForCausalLM", "LlamaConfig"),
        tokenizer_4=letters(),
        transformer=transformer,
    )
    pipe.default_sample_size = 8  # whatever size is asked for becomes as many pixels as this
    return pipe


@case("HunyuanImagePipeline", family="HunyuanImage", call=SIZE, batch=1)
def _() -> Any:
    vae = make(
        df.AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )
    transformer = make(
        df.HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    pipe = assemble(
        df.HunyuanImagePipeline,
        scheduler=flow(shift=7.0),
        vae=vae,
        text_encoder=language("Qwen2ForCausalLM", "Qwen2Config"),
        tokenizer=letters(1024),
        text_encoder_2=t5(),
        tokenizer_2=letters(),
        transformer=transformer,
        guider=df.guiders.ClassifierFreeGuidance(guidance_scale=3.0),
        ocr_guider=df.guiders.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    return short(pipe)


def short(pipe: Any) -> Any:
    """Let the pipeline pad its prompts to few tokens in place of a thousand."""
    pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 16
    return pipe


@case("Kandinsky5T2IPipeline", family="Kandinsky 5", call=SIZE)
def _() -> Any:
    return small(kandinsky5("Kandinsky5T2IPipeline"))


@case("Kandinsky5I2IPipeline", family="Kandinsky 5", call=SIZE, conditions=given())
def _() -> Any:
    return small(kandinsky5("Kandinsky5I2IPipeline", visual_cond=True))


def small(pipe: Any) -> Any:
    """Let the pipeline draw small pictures: every size becomes one of its list."""
    pipe.resolutions = [(32, 32)]
    return pipe


def kandinsky5(cls: str, visual_cond: bool = False, **parts: Any) -> Any:
    transformer = make(
        df.Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        visual_cond=visual_cond,
    )
    return assemble(
        getattr(df, cls),
        **{
            "transformer": transformer,
            # Sizes are divided by 8 whatever the autoencoder does.
            "vae": make(df.AutoencoderKL, latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": language("Qwen2ForCausalLM", "Qwen2Config"),
            "tokenizer": letters(1024),
            "text_encoder_2": clip(length=77),
            "tokenizer_2": tiny.tokenizer(77),
            "scheduler": flow(),
            **parts,
        },
    )


@case("PRXPipeline", family="PRX", call={**SIZE, "use_resolution_binning": False}, batch=1)
def _() -> Any:
    return prx("PRXPipeline", vae=kl(shift_factor=0.0), default_sample_size=8)


@case("PRXPixelPipeline", family="PRX", call={**SIZE, "use_resolution_binning": False}, batch=1)
def _() -> Any:
    return prx("PRXPixelPipeline", 3, prompt_max_tokens=16)


def prx(cls: str, channels: int = 4, **parts: Any) -> Any:
    transformer = make(
        df.PRXTransformer2DModel,
        in_channels=channels,
        patch_size=2,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    without_ftfy(getattr(df, cls))
    return assemble(
        getattr(df, cls),
        transformer=transformer,
        scheduler=flow(),
        text_encoder=t5(),
        tokenizer=letters(),
        **parts,
    )
