"""Tiny pipelines with random weights, built from configs: what tests run on when pictures do not matter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["a", "red", "blue", "green", "cat", "dog", "star", "two"]


def tokenizer(length: int = 8) -> CLIPTokenizer:
    """A real CLIPTokenizer with one token per byte and per word of ``WORDS``."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = pieces[0], pieces[1]
            if f"{pair[0]} {pair[1]}" not in merges:
                merges.append(f"{pair[0]} {pair[1]}")
            pieces = ["".join(pair), *pieces[2:]]
            if pieces[0] not in vocab:
                vocab.append(pieces[0])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocab)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        return CLIPTokenizer(
            f"{folder}/vocab.json",
            f"{folder}/merges.txt",
            model_max_length=length,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        )


def _text_config(vocab: int, width: int = 16, length: int = 8) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    """A tiny autoencoder: 16 x 16 pixels to 8 x 8 latents."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def sd_pipeline(scheduler: Any = None) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of a few thousand parameters (noise prediction)."""
    tok = tokenizer()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(_text_config(len(tok))),
        tokenizer=tok,
        unet=unet,
        scheduler=scheduler
        or DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline(scheduler: Any = None) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of a few thousand parameters (flow matching)."""
    tok = tokenizer()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    for parameter in (transformer.proj_out.weight, *(b.norm1.linear.weight for b in transformer.transformer_blocks)):
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.0),
        text_encoder=CLIPTextModelWithProjection(_text_config(len(tok))),
        tokenizer=tok,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(len(tok))),
        tokenizer_2=tok,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.difftune_call = {"max_sequence_length": 8}
    return pipe


PIPELINES = {"sd": sd_pipeline, "sd3": sd3_pipeline}
