"""``difftune evaluate``: the stock pipeline, base against tuned, scored on fresh noise; also at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftune.cli.adapters import asked_prompts, call_of, locate, model_of, settings_of
from difftune.cli.messages import say
from difftune.cli.options import Adapter, Device, Model, Plugins
from difftune.cli.pictures import write_pairs
from difftune.cli.results import comparison_lines, plugin_options

if TYPE_CHECKING:
    from difftune.config import RunConfig
    from difftune.prompts import Prompt
    from difftune.tracking import Comparison


def evaluate(
    adapter: Adapter,
    number: Annotated[int, typer.Option("-n", min=2, help="Pictures drawn by each of base and tuned.")] = 64,
    prompts: Annotated[str | None, typer.Option(help="A prompt file or set; the run's held-out by default.")] = None,
    reward: Annotated[str | None, typer.Option(help="A reward's name; the run's by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; training never sees it.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; those of the run by default.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance; that of the run by default.")] = None,
    model: Model = None,
    plugin: Plugins = None,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON here.")] = None,
) -> None:
    """Mean reward of base and tuned model on held-out prompts: stock pipeline, saved file, fresh noise."""
    import json

    from difftune.checkpoint import write_atomically
    from difftune.config import validate
    from difftune.types import UserError

    source = locate(adapter)
    settings = settings_of(source)
    if reward is None and "reward" not in settings:
        raise UserError("the adapter does not name its reward; give it with --reward")
    asked = {"seed": seed, "steps": steps, "guidance_scale": guidance}
    plugins = [str(path) for path in plugin or []]
    data = {
        "model": model_of(settings, model).model_dump(),
        "reward": settings.get("reward") if reward is None else reward,
        "sampler": settings.get("sampler") or {},
        "prompts": (settings.get("prompts") or [""]) if prompts is None else prompts,
        "evaluate": {**(settings.get("evaluate") or {}), **{k: v for k, v in asked.items() if v is not None}},
        "plugins": plugins,
        "device": device,
        # Nothing is trained: the algorithm is only what a configuration cannot do without.
        "algorithm": "ddpo",
    }
    try:
        config = validate(data, trains=False)
    except UserError as error:
        of_the_run = settings.get("plugins") if reward is None else None
        raise UserError(_with_plugin_named(str(error), of_the_run, plugins)) from None
    entries = asked_prompts(None, prompts, settings)
    comparison = compare_adapter(source, config, entries, number)
    figures = comparison.summary()
    names = list(figures["before"])
    width = max(map(len, names))
    say(f"{'':<{width}}  {'base':>10}  {'tuned':>10}")
    for name in names:
        say(f"{name:<{width}}  {figures['before'][name]:>10.4f}  {figures['after'][name]:>10.4f}")
    for line in comparison_lines(comparison):
        say(line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(figures, indent=2) + "\n")
        say(f"written to {out}")


def _with_plugin_named(message: str, of_the_run: Any, given: Sequence[str]) -> str:
    """Add to the line of an unknown reward which plug-ins the run had: they are not run unless they are named."""
    names = of_the_run if isinstance(of_the_run, list) else []
    missing = [str(name) for name in names if Path(str(name)).name not in {Path(file).name for file in given}]
    hint = f"; the run took it from a plug-in: add {plugin_options(missing)}" if missing else ""
    return "\n".join(line + hint if "unknown reward" in line else line for line in message.splitlines())


def evaluate_run(out: Path, config: RunConfig) -> Comparison | None:
    """Evaluate the saved file with the stock pipeline; write figures and pictures, and card and report again."""
    import json

    from difftune.checkpoint import write_atomically
    from difftune.config import load_held_out
    from difftune.export import add_figures
    from difftune.report import write_report

    if os.environ.get("RANK", "0") != "0" or config.evaluate is None:
        return None
    prompts = load_held_out(config.prompts)
    comparison = compare_adapter(out / "adapter", config, prompts, config.evaluate.samples)
    summary = comparison.summary()
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    add_figures(out / "adapter", {"before": summary["before"], "after": summary["after"]})
    write_pairs(comparison.base, comparison.tuned, comparison.prompts, out / "before_after.png")
    write_report(out)
    return comparison


def compare_adapter(adapter: Path, config: RunConfig, prompts: Sequence[Prompt], samples: int) -> Comparison:
    """Draw base and tuned with the stock pipeline and score them as the run did."""
    from difftune.config import EvaluateConfig, check_metadata, load_model, load_reward, pick_device
    from difftune.export import load_adapter
    from difftune.tracking import compare, repeat_prompts

    evaluate = config.evaluate or EvaluateConfig.model_validate({})
    device = pick_device(config.device)
    entries = repeat_prompts(prompts, samples)
    reward = load_reward(config.reward).to(device)
    check_metadata(reward, entries)
    pipe = load_model(config.model).to(device)
    return compare(
        pipe,
        lambda: load_adapter(pipe, adapter),
        reward,
        entries,
        seed=evaluate.seed,
        steps=evaluate.steps or config.sampler.steps,
        guidance_scale=config.sampler.guidance_scale if evaluate.guidance_scale is None else evaluate.guidance_scale,
        batch_size=config.sampler.batch_size,
        call={**call_of(config.sampler), **evaluate.call},
        progress=_phase_lines("held-out pictures"),
    )


def _phase_lines(what: str) -> Any:
    """Return a progress callback that prints one line per phase, at its end."""

    def tell(phase: str, done: int, total: int) -> None:
        if done == total:
            say(f"{what}: {total} of the {phase} model")

    return tell
