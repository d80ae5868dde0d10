"""tiny-sd and tiny-flow: two text-to-image pipelines of the world over one autoencoder.

Both learn the text encoders together with the denoiser, and read prompts through their pipeline's own
`encode_prompt`, so that training and sampling see the same embeddings. A tenth of the captions is empty, which
teaches the unconditional prediction that guidance needs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from difftune.zoo.autoencoder import encode
from difftune.zoo.readouts import Readouts, label_cells, label_clauses, label_patches
from difftune.zoo.tokenizer import MAX_LENGTH, new_tokenizer, text_config
from difftune.zoo.training import fit, half_precision
from difftune.zoo.world import Scene, render_scenes, sample_caption, vocabulary

SCENES = 30_000
SCENE_SEED = 3

SD_STEPS = 3500
SD_BATCH = 32
SD_LEARNING_RATE = 1e-3
SD_WRONG_CAPTIONS = 0.3
"""Share of tiny-sd's captions that belong to another scene, as many do on the web: pictures are as sharp as with true
ones, what a caption says is followed less, and a reward has something to teach."""
SD_SEED = 4

FLOW_STEPS = 3500
FLOW_BATCH = 32
FLOW_LEARNING_RATE = 1e-3
FLOW_READOUT_BLOCK = 4
FLOW_READOUT_WEIGHT = 0.4
FLOW_WRONG_CAPTIONS = 0.5
"""The same share for tiny-flow, which follows its captions more closely."""
FLOW_SEED = 5
FLOW_WIDTH = 128
FLOW_LAYERS = 8
FLOW_TEXT_WIDTH = 96

LONG_SEQUENCE = 256
"""Default `max_sequence_length` of StableDiffusion3Pipeline: so many zero tokens come from the T5 slot."""

RESUMED_LEARNING_RATE = 0.4
"""Factor on the peak learning rate where training goes on from a finished model."""

RESUMED_SEED = 100
"""Added to the seed where training goes on, so that other batches are drawn."""

_LONG_EVERY = 8
_SNAPSHOTS = 6


def new_tiny_sd(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """An untrained StableDiffusionPipeline: a UNet of 5.3 M parameters that predicts noise, scheduled as SD 1.5."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(width=128, layers=2)),
        tokenizer=new_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(48, 96, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
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


def new_tiny_flow(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """An untrained StableDiffusion3Pipeline: joint attention, 4.7 M parameters, flow matching, no T5."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=FLOW_LAYERS,
        attention_head_dim=32,
        num_attention_heads=FLOW_WIDTH // 32,
        joint_attention_dim=2 * FLOW_TEXT_WIDTH,
        caption_projection_dim=FLOW_WIDTH,
        pooled_projection_dim=2 * 64,
        pos_embed_max_size=16,
    )
    _start_at_identity(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(FLOW_TEXT_WIDTH, layers=3)),
        tokenizer=new_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(FLOW_TEXT_WIDTH, layers=3)),
        tokenizer_2=new_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder whose output is zero, and a tokenizer for it.

    `StableDiffusion3Pipeline.from_pretrained` refuses a folder without its third text encoder unless the caller passes
    ``text_encoder_3=None``. With this one it loads as it is, and gives the very embeddings of a pipeline without T5.
    """
    words = ["\u2581" + word for word in vocabulary()]
    pieces = ["<pad>", "</s>", "<unk>", *words, "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    scores = [(piece, 0.0 if piece in words else -10.0) for piece in pieces]
    tokenizer = T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=LONG_SEQUENCE)
    encoder = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=8, num_heads=1, num_layers=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def _start_at_identity(transformer: SD3Transformer2DModel) -> None:
    """Zeroes the modulations and the output, so that every block starts as the identity, as DiT does."""
    layers = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def scene_latents(vae: AutoencoderKL, count: int = SCENES) -> tuple[list[Scene], Tensor]:
    """The scenes that both generators learn from and their scaled latents (count, 4, 16, 16)."""
    scenes, pictures = render_scenes(count, SCENE_SEED)
    with half_precision():
        latents = encode(vae, pictures).float()
    return scenes, latents * vae.config.scaling_factor


def _captions(scenes: list[Scene], chosen: np.ndarray, wrong_share: float, rng: np.random.Generator) -> list[str]:
    """A caption for each chosen scene; `wrong_share` of them are other scenes'."""
    wrong = rng.random(len(chosen)) < wrong_share
    described = np.where(wrong, rng.integers(len(scenes), size=len(chosen)), chosen)
    return [sample_caption(scenes[i], rng) for i in described]


def train_tiny_sd(
    vae: AutoencoderKL,
    scenes: list[Scene],
    latents: Tensor,
    steps: int = SD_STEPS,
    snapshot: Callable[[DiffusionPipeline], None] | None = None,
    start: StableDiffusionPipeline | None = None,
) -> StableDiffusionPipeline:
    """Trains tiny-sd by noise prediction: the mean of (eps(x_t, t, caption) - eps)^2 over uniform timesteps.

    `start` is a finished pipeline to train on; None starts from nothing.
    """
    seed = SD_SEED if start is None else SD_SEED + RESUMED_SEED
    torch.manual_seed(seed)
    pipeline = new_tiny_sd(vae) if start is None else start
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    scheduler = pipeline.scheduler
    rng = np.random.default_rng(seed)

    def loss_of_step(step: int) -> Tensor:
        chosen = rng.integers(len(scenes), size=SD_BATCH)
        captions = _captions(scenes, chosen, SD_WRONG_CAPTIONS, rng)
        x_0 = latents[chosen].contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (SD_BATCH,))
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        with half_precision():
            prompt_embeds, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
            predicted = unet(x_t, timesteps, prompt_embeds).sample
        return (predicted.float() - noise).pow(2).mean()

    fit(
        loss_of_step,
        [unet, pipeline.text_encoder],
        label="tiny-sd",
        steps=steps,
        learning_rate=SD_LEARNING_RATE * (1 if start is None else RESUMED_LEARNING_RATE),
        snapshot=None if snapshot is None else lambda: snapshot(pipeline),
        snapshot_every=steps // _SNAPSHOTS,
    )
    return pipeline


def train_tiny_flow(
    vae: AutoencoderKL,
    scenes: list[Scene],
    latents: Tensor,
    steps: int = FLOW_STEPS,
    snapshot: Callable[[DiffusionPipeline], None] | None = None,
    start: StableDiffusion3Pipeline | None = None,
) -> StableDiffusion3Pipeline:
    """Trains tiny-flow by flow matching: the mean of (v(x_t, t, caption) - (noise - x_0))^2, t logit-normal.

    A transformer of 64 tokens finds its way about a picture slowly, and colours are right long before shapes are. Three
    things helped (docs/experiments.md): position embeddings that are learned instead of low-frequency sines, read-outs
    in the middle of the network that ask where the objects are, and Muon in AdamW's place.

    The number of zero tokens in T5's place varies, so that any `max_sequence_length` works at sampling: from none to
    sixteen, and on every eighth step, with a quarter of the batch, the pipeline's default.

    `start` is a finished pipeline to train on; None starts from nothing.
    """
    seed = FLOW_SEED if start is None else FLOW_SEED + RESUMED_SEED
    torch.manual_seed(seed)
    pipeline = new_tiny_flow(vae) if start is None else start
    transformer = pipeline.transformer
    positions = transformer.pos_embed
    # Stock diffusers keeps them as a buffer of the same name, and loads what is learned here.
    positions.pos_embed = nn.Parameter(positions._buffers.pop("pos_embed").clone())
    readouts = Readouts(FLOW_WIDTH, FLOW_WIDTH, hidden=FLOW_WIDTH, cells=True)
    labels = (label_clauses(scenes), label_patches(scenes), label_cells(scenes))
    middle: dict[str, Tensor] = {}
    hook = transformer.transformer_blocks[FLOW_READOUT_BLOCK].register_forward_hook(
        lambda block, inputs, outputs: middle.update(patches=outputs[1])
    )
    rng = np.random.default_rng(seed)

    def loss_of_step(step: int) -> Tensor:
        long = step % _LONG_EVERY == _LONG_EVERY - 1
        batch = FLOW_BATCH // 4 if long else FLOW_BATCH
        zero_tokens = LONG_SEQUENCE if long else int(rng.integers(MAX_LENGTH + 1))
        chosen = rng.integers(len(scenes), size=batch)
        captions = _captions(scenes, chosen, FLOW_WRONG_CAPTIONS, rng)
        x_0 = latents[chosen]
        noise = torch.randn_like(x_0)
        t = torch.sigmoid(0.7 + 1.1 * torch.randn(batch))
        x_t = torch.lerp(x_0, noise, t.view(-1, 1, 1, 1))
        with half_precision():
            prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                captions, None, None, do_classifier_free_guidance=False, max_sequence_length=zero_tokens
            )
            velocity = transformer(
                x_t,
                encoder_hidden_states=prompt_embeds,
                pooled_projections=pooled_prompt_embeds,
                timestep=1000 * t,
            ).sample
        patches = middle["patches"].float()
        read = readouts(patches.mean(1), patches, *(label[chosen] for label in labels))
        return (velocity.float() - (noise - x_0)).pow(2).mean() + FLOW_READOUT_WEIGHT * read

    fit(
        loss_of_step,
        [transformer, pipeline.text_encoder, pipeline.text_encoder_2, readouts],
        label="tiny-flow",
        muon=True,
        steps=steps,
        learning_rate=FLOW_LEARNING_RATE * (1 if start is None else RESUMED_LEARNING_RATE),
        snapshot=None if snapshot is None else lambda: snapshot(pipeline),
        snapshot_every=steps // _SNAPSHOTS,
    )
    hook.remove()
    positions.register_buffer("pos_embed", positions._parameters.pop("pos_embed").detach(), persistent=True)
    return pipeline


def load_float(name: str, folder: Path) -> DiffusionPipeline:
    """A finished pipeline in 32-bit floats, to be trained on; tiny-flow without its silent T5."""
    if name == "tiny-sd":
        return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return StableDiffusion3Pipeline.from_pretrained(
        folder, torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )


def save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes a copy of the pipeline in 16-bit floats, as safetensors; the pipeline itself stays in 32 bits.

    A StableDiffusion3Pipeline without T5 gets a silent one, so that it loads like any other.
    """
    components = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
    }
    if isinstance(pipeline, StableDiffusionPipeline):
        components["requires_safety_checker"] = False
    else:
        encoder, tokenizer = silent_t5(pipeline.transformer.config.joint_attention_dim)
        components |= {"text_encoder_3": encoder.half(), "tokenizer_3": tokenizer}
    type(pipeline)(**components).save_pretrained(folder)
    clean_configs(folder)


def clean_configs(folder: Path) -> None:
    """Rewrites the configs below `folder`, saved from a copy in 16-bit floats, so that anybody can load it.

    Where a part was loaded from is a path of the machine that trained it. And transformers loads in the dtype its
    config names while diffusers loads in 32 bits: a stock pipeline would hold both, and stop at the first product.
    """
    for file in folder.rglob("config.json"):
        content = json.loads(file.read_text())
        content.pop("_name_or_path", None)
        if "dtype" in content:
            content["dtype"] = "float32"
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
