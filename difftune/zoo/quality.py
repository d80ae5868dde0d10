"""Measures the embedded models: ``python -m difftune.zoo.quality``.

Every figure is read from the pixels by `difftune.zoo.reader`. "clauses" is the mean score over the clauses of a
caption, "correct" the share of pictures with every clause right, which is GenEval's measure. tiny-clip and tiny-vlm are
asked about rendered scenes, of which the truth is known.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from difftune.zoo import MODELS, PREFIX, model_path
from difftune.zoo.autoencoder import decode, encode, to_model
from difftune.zoo.reader import read_scene, score_clauses
from difftune.zoo.vlm import QUESTIONS, false_caption
from difftune.zoo.world import (
    CLAUSES,
    Scene,
    caption,
    parse_caption,
    render,
    render_scenes,
    sample_caption,
    sample_scene,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

HELD_OUT_SEED = 1_000_003
"""Seed of every measurement; the models are trained on other seeds."""

GUIDANCE = (1.0, 2.0, 4.0, 6.0)
STEPS = (10, 20)


@dataclass(frozen=True)
class SceneScore:
    """Mean scores in [0, 1] over `pictures` pictures.

    Attributes:
        clauses: Mean over the clauses of each caption.
        correct: Share of pictures with all clauses right.
        pictures: How many were read.
    """

    clauses: float
    correct: float
    pictures: int


def score_pictures(pictures: np.ndarray, captions: Sequence[str]) -> SceneScore:
    """Scores pictures (N, 3, H, W) in [0, 1] against one non-empty caption of the world each.

    Raises:
        ValueError: a caption names no clause.
    """
    means = []
    for picture, text in zip(pictures, captions, strict=True):
        scores = score_clauses(read_scene(picture), parse_caption(text))
        if not scores:
            raise ValueError(f"the caption {text!r} names no clause; expected a non-empty caption of the world.")
        means.append(sum(scores.values()) / len(scores))
    return SceneScore(float(np.mean(means)), float(np.mean([mean == 1 for mean in means])), len(means))


def held_out_captions(count: int, full: bool, seed: int = HELD_OUT_SEED) -> list[str]:
    """Captions of fresh scenes: of everything, or sampled as in training but never empty."""
    rng = np.random.default_rng(seed)
    captions: list[str] = []
    while len(captions) < count:
        scene = sample_scene(rng)
        if text := caption(scene) if full else sample_caption(scene, rng):
            captions.append(text)
    return captions


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """The pipeline in `folder`, in 32-bit floats and without its progress bar."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    guidance_scale: float,
    steps: int,
    eta: float = 1.0,
    batch: int = 32,
) -> np.ndarray:
    """Pictures (N, 3, 64, 64) in [0, 1], one for each caption, always from the same noise.

    `eta` is DDIM's; flow matching is sampled as an ODE.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    extra = {"eta": eta} if hasattr(pipeline, "unet") else {"max_sequence_length": 12}
    chunks = [
        pipeline(
            list(captions[start : start + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="np",
            **extra,
        ).images
        for start in range(0, len(captions), batch)
    ]
    return np.concatenate(chunks).transpose(0, 3, 1, 2)


def measure_autoencoder(vae: AutoencoderKL, count: int = 200) -> SceneScore:
    """How many clauses of a full description survive encoding and decoding."""
    scenes, pictures = render_scenes(count, HELD_OUT_SEED)
    reconstructed = decode(vae, encode(vae, pictures)).numpy()
    return score_pictures(reconstructed, [caption(scene) for scene in scenes])


@torch.no_grad()
def measure_retrieval(model: CLIPModel, processor: CLIPProcessor, rounds: int = 4, candidates: int = 64) -> float:
    """Share of scenes whose full caption tiny-clip ranks first among the captions of `candidates` distinct scenes."""
    hits = []
    for turn in range(rounds):
        scenes, pictures = render_scenes(2 * candidates, HELD_OUT_SEED + turn)
        distinct = list({caption(scene): index for index, scene in enumerate(scenes)}.items())[:candidates]
        tokens = processor.tokenizer([text for text, _ in distinct], padding=True, return_tensors="pt")
        shown = to_model(pictures[[index for _, index in distinct]])
        best = model(**tokens, pixel_values=shown).logits_per_image.argmax(1)
        hits.append((best == torch.arange(len(distinct))).float().mean().item())
    return float(np.mean(hits))


@torch.no_grad()
def answers(model: Any, processor: Any, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """The most likely first word of each answer of an image-text-to-text model, by its own processor."""
    processor.tokenizer.padding_side = "left"
    found = []
    for start in range(0, len(questions), 32):
        rows = slice(start, start + 32)
        told = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions[rows]
        ]
        texts = processor.apply_chat_template(told, add_generation_prompt=True)
        inputs = processor(text=texts, images=list(pictures[rows]), padding=True, return_tensors="pt")
        found += model(**inputs).logits[:, -1].argmax(-1).tolist()
    return [processor.tokenizer.decode([token]) for token in found]


def measure_judge(model: Any, processor: Any, count: int = 100) -> dict[str, float]:
    """Share of right answers of tiny-vlm, in all three forms of the question, by what is asked.

    Args:
        model: The judge.
        processor: Its processor.
        count: Held-out scenes, each asked about in every one of these ways.

    Returns:
        "true": captions that name everything, or a random part. "other": those of another scene, where they are wrong.
        For each clause "miss CLAUSE": captions of which that one clause is wrong, half of them full. "near misses":
        all of those.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    scenes = [sample_scene(rng) for _ in range(count)]
    asked: list[tuple[str, Scene, str]] = []
    for scene, other in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        asked += [("true", scene, caption(scene)), ("true", scene, sample_caption(scene, rng) or caption(scene))]
        asked.append(("other", scene, caption(other)))
        asked += [(f"miss {clause}", scene, false_caption(scene, rng, clause)) for clause in CLAUSES]
    asked = [one for one in asked if one[0] != "other" or parse_caption(one[2]) != one[1].clauses]
    questions = [QUESTIONS[i % len(QUESTIONS)].format(prompt=text) for i, (_, _, text) in enumerate(asked)]
    said = answers(model, processor, [render(scene) for _, scene, _ in asked], questions)
    right = defaultdict(list)
    for (kind, _, _), answer in zip(asked, said, strict=True):
        right[kind].append(answer == ("yes" if kind == "true" else "no"))
        if kind.startswith("miss"):
            right["near misses"].append(answer == "no")
    return {kind: float(np.mean(found)) for kind, found in right.items()}


def save_grid(pictures: np.ndarray, file: Path, columns: int = 8, zoom: int = 2) -> None:
    """Writes pictures (N, 3, H, W) in [0, 1] as one PNG, row by row, magnified without smoothing."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    grid = np.ones((rows * columns, 3, height, width), dtype=np.float32)
    grid[:count] = pictures
    tiled = grid.reshape(rows, columns, 3, height, width).transpose(0, 3, 1, 4, 2)
    array = (255 * tiled.reshape(rows * height, columns * width, 3)).round().astype(np.uint8)
    image = Image.fromarray(array).resize((zoom * columns * width, zoom * rows * height), Image.Resampling.NEAREST)
    image.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def report(
    names: Sequence[str],
    count: int,
    folder: Path | None = None,
    grids: Path | None = None,
    every_steps: Sequence[int] = STEPS,
    every_guidance: Sequence[float] = GUIDANCE,
) -> None:
    """Prints the figures of the named models.

    Args:
        names: Keys of `MODELS`.
        count: Pictures per figure.
        folder: Where the models are; None takes the embedded ones.
        grids: Folder for a grid of samples of every generator; None writes none.
        every_steps: Numbers of denoising steps to measure.
        every_guidance: Guidance scales to measure.
    """
    console = Console()
    for name in names:
        path = model_path(name) if folder is None else folder / name.removeprefix(PREFIX)
        if MODELS[name].kind == "clip":
            from transformers import CLIPModel, CLIPProcessor

            figure = measure_retrieval(CLIPModel.from_pretrained(path).float(), CLIPProcessor.from_pretrained(path))
            console.print(f"{name}: top-1 retrieval of the full caption among 64: {figure:.3f}")
            continue
        if MODELS[name].kind == "vlm":
            from transformers import AutoModelForImageTextToText, AutoProcessor

            judge = AutoModelForImageTextToText.from_pretrained(path).float()
            shares = measure_judge(judge, AutoProcessor.from_pretrained(path), count)
            figures = ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items())
            console.print(f"{name}: right answers: {figures}")
            continue
        pipeline = load_pipeline(path)
        score = measure_autoencoder(pipeline.vae)
        console.print(f"{name}: autoencoder: clauses {score.clauses:.3f}, correct {score.correct:.3f}")
        console.print(generator_table(name, pipeline, count, every_steps, every_guidance))
        if grids is not None:
            captions = held_out_captions(24, full=True)
            save_grid(generate(pipeline, captions, 4.0, 10), grids / f"zoo_{name.removeprefix(PREFIX)}.png")


def generator_table(
    name: str,
    pipeline: DiffusionPipeline,
    count: int,
    every_steps: Sequence[int] = STEPS,
    every_guidance: Sequence[float] = GUIDANCE,
) -> Table:
    """Scene scores for full and for sampled captions at every guidance and number of steps."""
    table = Table(title=f"{name}: {count} pictures a row (clauses / correct)")
    for heading in ("steps", "guidance", "full captions", "sampled captions"):
        table.add_column(heading, justify="right")
    for steps in every_steps:
        for guidance_scale in every_guidance:
            cells = []
            for full in (True, False):
                captions = held_out_captions(count, full)
                score = score_pictures(generate(pipeline, captions, guidance_scale, steps), captions)
                cells.append(f"{score.clauses:.3f} / {score.correct:.3f}")
            table.add_row(str(steps), f"{guidance_scale:g}", *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """The command line: which models, how many pictures, and where to put sample grids."""
    parser = argparse.ArgumentParser(prog="python -m difftune.zoo.quality", description="Measure the embedded models.")
    short = [name.removeprefix(PREFIX) for name in MODELS]
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {', '.join(short)}; all by default")
    parser.add_argument("--samples", type=int, default=128, help="pictures per figure")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of denoising steps")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE, help="guidance scales")
    parser.add_argument("--folder", type=Path, help="measure the models in this folder instead of the embedded ones")
    parser.add_argument("--grids", type=Path, help="write a grid of samples of every generator to this folder")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.models) - set(short):
        parser.error(f"unknown models {', '.join(sorted(unknown))}; expected any of {', '.join(short)}")
    torch.set_flush_denormal(True)
    names = [PREFIX + name for name in chosen.models or short]
    report(names, chosen.samples, chosen.folder, chosen.grids, chosen.steps, chosen.guidance)


if __name__ == "__main__":
    main()
