"""Rebuilds the embedded models from nothing, on a CPU: ``python -m difftune.zoo.build all --out DIR``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from difftune.zoo import autoencoder, clip, generator, model_path, vlm
from difftune.zoo.world import Scene


def shared_autoencoder(out: Path, steps_scale: float) -> AutoencoderKL:
    """The autoencoder under ``out/autoencoder``; trained and written there first if there is none."""
    folder = out / "autoencoder"
    if not (folder / "config.json").exists():
        autoencoder.train_autoencoder(max(1, round(autoencoder.STEPS * steps_scale))).save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


def build_clip(out: Path, steps_scale: float) -> None:
    """Trains tiny-clip and writes it to ``out/tiny-clip``."""
    model, processor = clip.train_clip(max(1, round(clip.STEPS * steps_scale)))
    model.half().save_pretrained(out / "tiny-clip")
    processor.save_pretrained(out / "tiny-clip")
    generator.clean_configs(out / "tiny-clip")


def build_vlm(out: Path, steps_scale: float) -> None:
    """Trains tiny-vlm from ``out/tiny-clip``, or the embedded one where there is none, into ``out/tiny-vlm``."""
    start = out / "tiny-clip"
    if not (start / "config.json").exists():
        start = model_path("difftune/tiny-clip")
    model, processor = vlm.train_vlm(start, max(1, round(vlm.STEPS * steps_scale)))
    model.half().save_pretrained(out / "tiny-vlm")
    processor.save_pretrained(out / "tiny-vlm")
    generator.clean_configs(out / "tiny-vlm")


def shared_latents(out: Path, vae: AutoencoderKL, steps_scale: float) -> tuple[list[Scene], Tensor]:
    """The generators' training set, kept in ``out/autoencoder/latents.pt`` so that it is encoded once."""
    file = out / "autoencoder" / "latents.pt"
    count = max(100, round(generator.SCENES * min(1.0, steps_scale)))
    if not file.exists():
        scenes, latents = generator.scene_latents(vae, count)
        torch.save({"scenes": [asdict(scene) for scene in scenes], "latents": latents}, file)
    stored = torch.load(file, weights_only=True)
    return [Scene(**fields) for fields in stored["scenes"]], stored["latents"]


def build_generator(name: str, out: Path, steps_scale: float, resume: bool = False) -> None:
    """Trains tiny-sd or tiny-flow and writes it to ``out/<name>``, an unfinished copy now and then.

    `resume` goes on from the model that is there.
    """
    vae = shared_autoencoder(out, steps_scale)
    scenes, latents = shared_latents(out, vae, steps_scale)
    train, steps = {
        "tiny-sd": (generator.train_tiny_sd, generator.SD_STEPS),
        "tiny-flow": (generator.train_tiny_flow, generator.FLOW_STEPS),
    }[name]

    def save(pipeline: DiffusionPipeline) -> None:
        generator.save_half(pipeline, out / name)

    start = generator.load_float(name, out / name) if resume else None
    save(train(vae, scenes, latents, max(1, round(steps * steps_scale)), snapshot=save, start=start))


def main(arguments: list[str] | None = None) -> None:
    """The command line: which model, where to, and how long."""
    parser = argparse.ArgumentParser(prog="python -m difftune.zoo.build", description=__doc__)
    parser.add_argument("model", choices=["autoencoder", "tiny-clip", "tiny-vlm", "tiny-sd", "tiny-flow", "all"])
    parser.add_argument("--out", type=Path, default=Path("zoo"), help="folder to write the models to")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on every number of training steps")
    parser.add_argument("--resume", action="store_true", help="train a generator in the folder further")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads to use")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    # Values that underflow cost a CPU a hundred times as long as zero.
    torch.set_flush_denormal(True)
    if chosen.model == "autoencoder":
        vae = shared_autoencoder(chosen.out, chosen.steps_scale)
        shared_latents(chosen.out, vae, chosen.steps_scale)
    if chosen.model in ("tiny-clip", "all"):
        build_clip(chosen.out, chosen.steps_scale)
    if chosen.model in ("tiny-vlm", "all"):
        build_vlm(chosen.out, chosen.steps_scale)
    for name in ("tiny-sd", "tiny-flow"):
        if chosen.model in (name, "all"):
            build_generator(name, chosen.out, chosen.steps_scale, chosen.resume)


if __name__ == "__main__":
    main()
