"""``difftune generate``: pictures with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftune.cli.adapters import asked_prompts, call_of, locate, model_of, settings_of
from difftune.cli.messages import say
from difftune.cli.options import Adapter, Device, Model
from difftune.cli.pictures import free_folder, stills, write_pairs, write_pictures

if TYPE_CHECKING:
    pass


def generate(
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may come several times.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt file or a built-in set.")] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; those of the run by default.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance; that of the run by default.")] = None,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; generated/ by default.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Draw the base model's picture beside each.")] = False,
    device: Device = "auto",
) -> None:
    """Draw pictures with an adapter in the stock pipeline, and a grid of them."""
    from difftune.config import SamplerConfig, load_model, pick_device
    from difftune.export import load_adapter
    from difftune.prompts import conditions_of
    from difftune.report import sample_grid
    from difftune.tracking import draw

    source = locate(adapter)
    settings = settings_of(source)
    sampler = SamplerConfig.model_validate(settings.get("sampler") or {})
    trained = "sampler" in settings
    # Eight of the run's own prompts are enough to look at.
    asked = asked_prompts(prompt, prompts, settings)[: None if prompt or prompts else 8]
    entries = [entry for entry in asked for _ in range(number)]
    texts = [entry.text for entry in entries]
    pipe = load_model(model_of(settings, model)).to(pick_device(device))
    drawing: dict[str, Any] = {
        "seed": seed,
        "steps": steps or (sampler.steps if trained else None),
        "guidance_scale": sampler.guidance_scale if guidance is None else guidance,
        "batch_size": sampler.batch_size,
        "call": call_of(sampler),
        "conditions": conditions_of(entries),
    }
    base = draw(pipe, texts, **drawing) if compare else None
    load_adapter(pipe, source)
    tuned = draw(pipe, texts, **drawing)
    folder = out if out is not None else free_folder(Path("generated"))
    write_pictures(tuned, folder, "" if base is None else "_tuned")
    if base is None:
        grid = sample_grid(stills(tuned), min(8, len(tuned)), path=folder / "grid.png", captions=texts)
    else:
        write_pictures(base, folder, "_base")
        grid = write_pairs(base, tuned, texts, folder / "grid.png", limit=64)
    say(f"{len(tuned)} pictures in {folder}, together in {grid}")
