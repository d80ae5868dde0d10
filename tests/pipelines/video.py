"""Video."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny
import transformers as tf

from pipelines.images import kandinsky5, short
from pipelines.parts import (
    SIZE,
    VOCAB,
    assemble,
    case,
    clip,
    ddim,
    flow,
    given,
    image_processor,
    kl,
    language,
    letters,
    make,
    pictures,
    t5,
    vision,
    without_ftfy,
    without_torchvision,
)
from pipelines.stable_diffusion import sd


def wan_vae() -> Any:
    return make(df.AutoencoderKLWan, base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def wan_transformer(cls: Any = df.WanTransformer3DModel, **config: Any) -> Any:
    return make(
        cls,
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
    without_ftfy(getattr(df, cls))
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


@case("ChronoEditPipeline", family="Wan", call=WAN, conditions=given(), batch=1)
def _() -> Any:
    transformer = wan_transformer(df.ChronoEditTransformer3DModel, in_channels=36, image_dim=16)
    return wan("ChronoEditPipeline", transformer=transformer, scheduler=flow(shift=3.0), image_encoder=vision(),
               image_processor=image_processor())  # fmt: skip


@case("SkyReelsV2Pipeline", family="SkyReels", call=WAN)
def _() -> Any:
    return wan("SkyReelsV2Pipeline", transformer=skyreels())


def skyreels(**config: Any) -> Any:
    return wan_transformer(df.SkyReelsV2Transformer3DModel, **config)


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


def hunyuan_vae() -> Any:
    return make(
        df.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )


def hunyuan_video(cls: str, channels: int = 4, condition: str | None = None, **parts: Any) -> Any:
    transformer = make(
        df.HunyuanVideoTransformer3DModel,
        in_channels=channels,
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
        image_condition_type=condition,
    )
    return assemble(
        getattr(df, cls),
        **{
            "text_encoder": language("LlamaModel", "LlamaConfig"),
            "tokenizer": letters(512),
            "text_encoder_2": clip(length=77),
            "tokenizer_2": tiny.tokenizer(77),
            "transformer": transformer,
            "vae": hunyuan_vae(),
            "scheduler": flow(shift=7.0),
            **parts,
        },
    )


TEMPLATE = {"template": "describe: {}", "crop_start": 10}


@case(
    "HunyuanVideoPipeline",
    family="HunyuanVideo",
    call={**SIZE, "num_frames": 5, "prompt_template": TEMPLATE, "max_sequence_length": 16},
)
def _() -> Any:
    return hunyuan_video("HunyuanVideoPipeline")


@case("EasyAnimatePipeline", family="EasyAnimate", call={**SIZE, "num_frames": 5, "negative_prompt": "dog"})
def _() -> Any:
    vae = make(
        df.AutoencoderKLMagvit,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    transformer = make(
        df.EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        mmdit_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    return assemble(
        df.EasyAnimatePipeline,
        vae=vae,
        text_encoder=language("Qwen2Model", "Qwen2Config"),
        tokenizer=letters(256),
        transformer=transformer,
        scheduler=flow(),
    )


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


@case("WanVACEPipeline", family="Wan", call={**WAN, "conditioning_scale": 1.0}, batch=1)
def _() -> Any:
    transformer = wan_transformer(df.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=2 * 16 + 64)
    return wan("WanVACEPipeline", transformer=transformer)


@case("WanImageToVideoPipeline (2.2, a time per token)", family="Wan", call={**WAN, "height": 32, "width": 32},
      conditions=given(size=32), batch=1)  # fmt: skip
def _() -> Any:
    return wan("WanImageToVideoPipeline", expand_timesteps=True)


@case("SkyReelsV2ImageToVideoPipeline", family="SkyReels", call=WAN, conditions=given(), batch=1)
def _() -> Any:
    return wan("SkyReelsV2ImageToVideoPipeline", transformer=skyreels(in_channels=36, image_dim=16),
               image_encoder=vision(), image_processor=image_processor())  # fmt: skip


@case("LucyEditPipeline", family="Wan", call=WAN,
      conditions=lambda count: {"video": [pictures(5) for _ in range(count)]}, batch=1)  # fmt: skip
def _() -> Any:
    return wan("LucyEditPipeline", transformer=wan_transformer(in_channels=32), scheduler=flow(shift=3.0))


@case("CogVideoXFunControlPipeline", family="CogVideoX", call={**SIZE, "max_sequence_length": 16},
      conditions=lambda count: {"control_video": [pictures(8) for _ in range(count)]}, batch=1)  # fmt: skip
def _() -> Any:
    return cogvideox("CogVideoXFunControlPipeline", channels=8)


@case(
    "HunyuanSkyreelsImageToVideoPipeline",
    family="HunyuanVideo",
    call={**SIZE, "num_frames": 5, "prompt_template": TEMPLATE, "max_sequence_length": 16},
    conditions=given(),
    batch=1,
)
def _() -> Any:
    return hunyuan_video("HunyuanSkyreelsImageToVideoPipeline", channels=8)


LLAVA_TEMPLATE = {
    "template": "{}",
    "crop_start": 0,
    "image_emb_len": 4,
    "image_emb_start": 0,
    "image_emb_end": 4,
    "double_return_token_id": 100,
}


@case(
    "HunyuanVideoImageToVideoPipeline",
    family="HunyuanVideo",
    call={**SIZE, "num_frames": 5, "max_sequence_length": 16, "prompt_template": LLAVA_TEMPLATE},
    conditions=given(size=32),
    batch=1,
)
def _() -> Any:
    vision_config = tf.CLIPVisionConfig(hidden_size=16, image_size=32, projection_dim=16, intermediate_size=32,
                                        num_attention_heads=2, num_hidden_layers=2, patch_size=16)  # fmt: skip
    text_config = tf.LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                 num_attention_heads=2, max_position_embeddings=1024, pad_token_id=0)  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=120,
                            vision_feature_layer=-1)  # fmt: skip
    config.pad_token_id = 0
    return hunyuan_video(
        "HunyuanVideoImageToVideoPipeline",
        channels=9,
        condition="latent_concat",
        text_encoder=make(tf.LlavaForConditionalGeneration, config=config),
        image_processor=image_processor(),
    )


@case(
    "HunyuanVideoFramepackPipeline",
    family="HunyuanVideo",
    call={"height": 32, "width": 32, "num_frames": 9, "latent_window_size": 3, "max_sequence_length": 16,
          "prompt_template": {"template": "{}", "crop_start": 0}},
    conditions=given(size=32),
    steps=2,
    batch=1,
)  # fmt: skip
def _() -> Any:
    transformer = make(
        df.HunyuanVideoFramepackTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    return hunyuan_video("HunyuanVideoFramepackPipeline", transformer=transformer, **siglip())


def siglip() -> dict[str, Any]:
    """An image encoder and its processor."""
    config = tf.SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   image_size=32, patch_size=16)  # fmt: skip
    processor = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    return {"image_encoder": make(tf.SiglipVisionModel, config=config), "feature_extractor": processor}


@case("HunyuanVideo15ImageToVideoPipeline", family="HunyuanVideo", call={"num_frames": 5}, conditions=given(),
      batch=1)  # fmt: skip
def _() -> Any:
    return hunyuan15("HunyuanVideo15ImageToVideoPipeline", "i2v", **siglip())


@case("HunyuanVideo15Pipeline", family="HunyuanVideo", call={**SIZE, "num_frames": 5}, batch=1)
def _() -> Any:
    return hunyuan15("HunyuanVideo15Pipeline", "t2v")


def hunyuan15(cls: str, task: str, **parts: Any) -> Any:
    vae = make(
        df.AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )
    transformer = make(
        df.HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type=task,
    )
    pipe = assemble(
        getattr(df, cls),
        text_encoder=language("Qwen2Model", "Qwen2Config"),
        tokenizer=letters(1200),
        transformer=transformer,
        vae=vae,
        scheduler=flow(shift=7.0),
        text_encoder_2=t5(),
        tokenizer_2=letters(256),
        guider=df.guiders.ClassifierFreeGuidance(guidance_scale=3.0),
        **parts,
    )
    pipe.vision_num_semantic_tokens = 4
    return short(pipe)


@case("Kandinsky5T2VPipeline", family="Kandinsky 5", call={**SIZE, "num_frames": 5})
def _() -> Any:
    return kandinsky5("Kandinsky5T2VPipeline", vae=hunyuan_vae())


@case("Kandinsky5I2VPipeline", family="Kandinsky 5", call={**SIZE, "num_frames": 21},
      conditions=given(), batch=1)  # fmt: skip
def _() -> Any:
    return kandinsky5("Kandinsky5I2VPipeline", visual_cond=True, vae=hunyuan_vae())


SANA_VIDEO = {
    "height": 32,
    "width": 32,
    "frames": 5,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
    "complex_human_instruction": None,
}


@case("SanaVideoPipeline", family="Sana", call=SANA_VIDEO)
def _() -> Any:
    return sana_video("SanaVideoPipeline")


@case("SanaImageToVideoPipeline", family="Sana", call=SANA_VIDEO, conditions=given(size=32), batch=1)
def _() -> Any:
    return sana_video("SanaImageToVideoPipeline")


def sana_video(cls: str) -> Any:
    transformer = make(
        df.SanaVideoTransformer3DModel,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return assemble(
        getattr(df, cls),
        tokenizer=letters(),
        text_encoder=language("Gemma2Model", "Gemma2Config", query_pre_attn_scalar=8),
        vae=wan_vae(),
        transformer=transformer,
        scheduler=flow(shift=3.0),
    )


class Guardrail:
    """Lets everything pass, in the place of NVIDIA's guardrail, which is a package of its own."""

    def to(self, device: Any) -> Guardrail:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos(cls: str, channels: int = 16, **parts: Any) -> Any:
    without_torchvision(df.CosmosTransformer3DModel)
    transformer = make(
        df.CosmosTransformer3DModel,
        in_channels=channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
    )
    return assemble(
        getattr(df, cls),
        **{
            "text_encoder": t5(),
            "tokenizer": letters(),
            "transformer": transformer,
            "vae": wan_vae(),
            "scheduler": flow(use_karras_sigmas=True),
            "safety_checker": Guardrail(),
            **parts,
        },
    )


COSMOS = {**SIZE, "max_sequence_length": 16}


@case("Cosmos2TextToImagePipeline", family="Cosmos", call=COSMOS)
def _() -> Any:
    return cosmos("Cosmos2TextToImagePipeline")


@case("Cosmos2VideoToWorldPipeline", family="Cosmos", call={**COSMOS, "num_frames": 5}, conditions=given(), batch=1)
def _() -> Any:
    return cosmos("Cosmos2VideoToWorldPipeline", channels=17)


def unet3d(cls: Any = None, **config: Any) -> Any:
    return make(
        cls or df.UNet3DConditionModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=2,
        **config,
    )


@case("TextToVideoSDPipeline", family="ModelScope", call={**SIZE, "num_frames": 2})
def _() -> Any:
    return sd("TextToVideoSDPipeline", unet=unet3d())


@case(
    "VideoToVideoSDPipeline",
    family="ModelScope",
    conditions=lambda count: {"video": [pictures(2) for _ in range(count)]},
    call={"strength": 0.8},
    steps=5,
    batch=1,
)
def _() -> Any:
    return sd("VideoToVideoSDPipeline", unet=unet3d())


@case("I2VGenXLPipeline", family="ModelScope", call={**SIZE, "num_frames": 2, "clip_skip": None},
      conditions=given(size=32), batch=1)  # fmt: skip
def _() -> Any:
    return sd("I2VGenXLPipeline", unet=unet3d(df.I2VGenXLUNet), image_encoder=vision(),
              feature_extractor=image_processor())  # fmt: skip
