"""Video."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers as df
import tiny
import transformers as tf

from pipelines.parts import (
    SIZE,
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
)


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
