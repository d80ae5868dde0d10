"""Speed and memory at the size of real models, with random weights: ``python -m difftune.performance``.

Denoisers and autoencoders have the published geometry and random weights, made on the device: nothing is downloaded.
Text encoders are single layers of the right width, since a run encodes each prompt once and keeps it. Each row is
measured in a process of its own, so that its peak of memory is its own: a rollout, a replay of its trained steps
forward and backward through a LoRA, and the gate's largest |ratio - 1|.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from difftune.memory import Compile
from difftune.policy import DTYPES, LoraConfig, Policy
from difftune.sampler import Sampler, StepView
from difftune.zoo.tokenizer import new_tokenizer

PROMPTS = ("two yellow stars on a dotted purple background", "a red circle")

#: The embedded tokenizer with the length of CLIP's, as the real pipelines have it.
_TOKENS = 77


@dataclass(frozen=True)
class Geometry:
    """A model's published sizes.

    Attributes:
        build: makes the pipeline; True makes its twin of a few thousand weights.
        pixels: height and width of a picture, of the model and of its twin.
        guidance_scale: of its rollouts.
        eta: noise of its dynamics.
    """

    build: Callable[[bool], Any]
    pixels: tuple[int, int]
    guidance_scale: float
    eta: float


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Attributes:
        model, compile, device, dtype: what was measured, and on what.
        batch, steps: samples per call and denoising steps.
        weights: the denoiser's, in billions.
        ratio_error: the largest |ratio - 1|.
        rollout: samples per second of a rollout, decoding included.
        update: samples per second of a replay of all noisy steps, forward and backward.
        peak: bytes at most, of the GPU or else of the process.
        first: seconds of the first rollout and replay, in which compilation happens.
    """

    model: str
    compile: str
    device: str
    dtype: str
    batch: int
    steps: int
    weights: float
    ratio_error: float
    rollout: float
    update: float
    peak: int
    first: float

    def line(self) -> str:
        """Return the row of the table."""
        return (
            f"| {self.model} | {self.weights:.3g} B | {self.batch} | {self.compile} | {self.ratio_error:.2g} | "
            f"{self.rollout:.3g} | {self.update:.3g} | {self.peak / 2**30:.1f} GiB | {self.first:.0f} s |"
        )


HEADER = (
    "| model | denoiser | batch | compile | ratio error | rollout, samples/s | update, samples/s | peak | first |\n"
    "|---|---:|---:|---|---:|---:|---:|---:|---:|"
)
"""The table's head."""


# -- the models ------------------------------------------------------------------------------------------------------


def _clip(width: int, projected: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = new_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=_TOKENS,
        projection_dim=projected or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if projected is None else CLIPTextModelWithProjection(config)


def _tokenizer() -> Any:
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = _TOKENS
    return tokenizer


def _autoencoder(channels: int, tiny: bool, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    widths = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1 if tiny else 2,
        norm_num_groups=4 if tiny else 32,
        **config,
    )


def _noise_schedule() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _sd15(tiny: bool) -> Any:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    width = 16 if tiny else 768
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8) if tiny else (320, 640, 1280, 1280),
        cross_attention_dim=width,
        attention_head_dim=2 if tiny else 8,
        norm_num_groups=4 if tiny else 32,
        layers_per_block=1 if tiny else 2,
    )
    return StableDiffusionPipeline(
        vae=_autoencoder(4, tiny),
        text_encoder=_clip(width),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=_noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(tiny: bool) -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    first, second = (8, 16) if tiny else (768, 1280)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(8, 8, 8) if tiny else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 10),
        attention_head_dim=2 if tiny else (5, 10, 20),
        cross_attention_dim=first + second,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8 if tiny else 256,
        projection_class_embeddings_input_dim=second + 6 * (8 if tiny else 256),
        norm_num_groups=4 if tiny else 32,
        layers_per_block=1 if tiny else 2,
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(4, tiny, scaling_factor=0.13025),
        text_encoder=_clip(first),
        text_encoder_2=_clip(second, projected=second),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_noise_schedule(),
        add_watermarker=False,
    )


def _sd35_medium(tiny: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second = (8, 8) if tiny else (768, 1280)
    layers = 2 if tiny else 24
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=8 if tiny else 64,
        num_attention_heads=2 if tiny else 24,
        joint_attention_dim=16 if tiny else 4096,
        caption_projection_dim=16 if tiny else 1536,
        pooled_projection_dim=first + second,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(1 if tiny else 13)),
        qk_norm="rms_norm",
    )
    # Without its third encoder the pipeline puts zeros of T5's length and width beside the text.
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(16, tiny, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(first, projected=first),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(second, projected=second),
        tokenizer_2=_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux(tiny: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    width, pooled = (16, 8) if tiny else (4096, 768)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1 if tiny else 19,
        num_single_layers=1 if tiny else 38,
        attention_head_dim=16 if tiny else 128,
        num_attention_heads=2 if tiny else 24,
        joint_attention_dim=width,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8) if tiny else (16, 56, 56),
    )
    t5 = T5Config(vocab_size=1024, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(16, tiny, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(pooled),
        tokenizer=_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=_tokenizer(),
    )


GEOMETRIES: dict[str, Geometry] = {
    "sd15": Geometry(_sd15, (512, 32), guidance_scale=5.0, eta=1.0),
    "sdxl": Geometry(_sdxl, (1024, 32), guidance_scale=5.0, eta=1.0),
    "sd35-medium": Geometry(_sd35_medium, (1024, 32), guidance_scale=4.5, eta=0.7),
    "flux": Geometry(_flux, (1024, 32), guidance_scale=3.5, eta=0.7),
}
"""Stable Diffusion 1.5, SDXL, Stable Diffusion 3.5 medium and FLUX.1."""


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Any:
    """Let modules be made on the device in their dtype: twelve billion weights are not to be cast and moved."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(
    model: str,
    *,
    tiny: bool = False,
    batch: int = 1,
    steps: int = 10,
    rounds: int = 3,
    compile: Compile = "no",
    device: str = "cpu",
    dtype: str = "bf16",
    gradient_checkpointing: bool = True,
) -> Row:
    """Measure one model in this process.

    Args:
        model: a key of :data:`GEOMETRIES`.
        tiny: its twin of a few thousand weights, to try the command.
        batch, steps: samples per call and denoising steps.
        rounds: rollouts and replays of which the medians are returned, after a first of each.
        compile, device, dtype, gradient_checkpointing: as in a configuration.
    """
    geometry = GEOMETRIES[model]
    torch.manual_seed(0)
    with _made_on(device, DTYPES[dtype]):
        pipe = geometry.build(tiny)
    pipe.set_progress_bar_config(disable=True)
    weights = sum(p.numel() for p in (getattr(pipe, "unet", None) or pipe.transformer).parameters())
    policy = Policy(pipe, LoraConfig(rank=16), gradient_checkpointing=gradient_checkpointing, compile=compile)
    policy.to(device)
    pixels = geometry.pixels[tiny]
    sampler = Sampler(
        policy, steps, geometry.guidance_scale, geometry.eta, batch_size=batch, height=pixels, width=pixels
    )
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]

    def rollout(epoch: int) -> tuple[float, Any]:
        return _timed(device, lambda: sampler.rollout(prompts, seed=0, epoch=epoch))

    def update(trajectory: Any) -> float:
        def on_step(view: StepView) -> None:
            view.log_prob.mean().backward()

        return _timed(device, lambda: sampler.replay(trajectory, on_step))[0]

    begun = time.perf_counter()
    _, trajectory = rollout(0)
    update(trajectory)
    first = time.perf_counter() - begun
    error = sampler.check_parity(trajectory, tolerance=float("inf"))["max_ratio_error"]
    drawn, trained = [], []
    for epoch in range(1, rounds + 1):
        seconds, trajectory = rollout(epoch)
        drawn.append(seconds)
        trained.append(update(trajectory))
    return Row(
        model=model,
        compile=compile,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        dtype=dtype,
        batch=batch,
        steps=steps,
        weights=weights / 1e9,
        ratio_error=error,
        rollout=batch / statistics.median(drawn),
        update=batch / statistics.median(trained),
        peak=_peak(device),
        first=first,
    )


def _timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _in_its_own_process(options: argparse.Namespace, model: str, compile: str) -> Row | str:
    """Return the row, or in one line why there is none."""
    command = [sys.executable, "-m", "difftune.performance", "--row", "--model", model, "--compile", compile]
    for name in ("batch", "steps", "rounds", "device", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--tiny"] * options.tiny + ["--no-checkpointing"] * options.no_checkpointing
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"ended with code {done.returncode}"
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and its rows as JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=list(GEOMETRIES), help="default: all")
    parser.add_argument("--compile", action="append", choices=["no", "full", "blocks"], help="default: no and full")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--no-checkpointing", action="store_true", help="keep the denoiser's activations")
    parser.add_argument("--tiny", action="store_true", help="twins of a few thousand weights, to try the command")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    models, compiles = options.model or list(GEOMETRIES), options.compile or ["no", "full"]
    if options.row:
        row = measure(
            models[0],
            tiny=options.tiny,
            batch=options.batch,
            steps=options.steps,
            rounds=options.rounds,
            compile=compiles[0],
            device=options.device,
            dtype=options.dtype,
            gradient_checkpointing=not options.no_checkpointing,
        )
        print(json.dumps(dataclasses.asdict(row)))
        return
    rows = []
    if not options.json:
        print(HEADER, flush=True)
    for model in models:
        for compile in compiles:
            row_or_reason = _in_its_own_process(options, model, compile)
            if isinstance(row_or_reason, str):
                print(f"{model}, compile {compile}: {row_or_reason}", file=sys.stderr, flush=True)
                continue
            rows.append(row_or_reason)
            if not options.json:
                print(row_or_reason.line(), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif rows:
        print(f"\n{rows[0].device}, PyTorch {torch.__version__}, {options.dtype}, {options.steps} steps")


if __name__ == "__main__":
    main()
