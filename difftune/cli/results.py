"""What a finished run says: the rewards, where things are, what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from difftune.cli.messages import command_name, say

if TYPE_CHECKING:
    from difftune.tracking import Comparison


def tell_results(out: Path, comparison: Comparison | None, plugins: Sequence[str] = ()) -> None:
    """Say what the run has reached, where its files are, and what to do next; ``plugins`` are the run's own."""
    say()
    for line in _reward_lines(out, comparison):
        say(line)
    grid = out / "before_after.png"
    if comparison is None:
        grid = max((out / "samples").glob("epoch_*.png"), default=grid)
    places = {"adapter": out / "adapter", "pictures": grid, "report": out / "report.html"}
    for name, path in places.items():
        if path.exists():
            say(f"{name:<9}{path}")
    command = command_name()
    following = {
        f"{command} generate {out} --compare": "more pictures, base beside tuned; your own: --prompt '...'",
        f"{command} evaluate {out} -n 128 {plugin_options(plugins)}".rstrip(): "the figures again, on more pictures",
        f"{command} new ddpo-scene-tiny-sd my.yaml": "a recipe to change; all of them: difftune list recipes",
    }
    width = max(map(len, following))
    say("next:")
    for command, purpose in following.items():
        say(f"  {command:<{width}}  # {purpose}")


def plugin_options(plugins: Sequence[str]) -> str:
    """Return the options that name plug-in files, each as short as it can be typed from here."""
    here = os.path.abspath("")
    short = [os.path.relpath(file, here) if os.path.isabs(file) else file for file in plugins]
    best = [file if name.startswith("..") else name for file, name in zip(plugins, short, strict=True)]
    return " ".join(f"--plugin {shlex.quote(name)}" for name in best)


def _reward_lines(out: Path, comparison: Comparison | None) -> list[str]:
    import json

    lines = []
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rewards = [record["reward/mean"] for record in records if "reward/mean" in record]
    if rewards:
        lines.append(f"reward in training: {rewards[0]:.4g} in the first epoch, {rewards[-1]:.4g} in the last")
    if comparison is not None:
        lines += comparison_lines(comparison)
    return lines


def comparison_lines(comparison: Comparison) -> list[str]:
    """Say how base and tuned compare, in two lines."""
    figures = comparison.summary()
    before, after = figures["before"], figures["after"]
    distinct = len(set(comparison.prompts))
    return [
        f"held out: {before['reward/mean']:.4g} ± {before['reward/std']:.2g} before, {after['reward/mean']:.4g} ± "
        f"{after['reward/std']:.2g} after: {comparison.gain:+.2f} standard deviations of the base",
        f"({len(comparison.prompts)} pictures each of {distinct} prompts, stock pipeline, the saved file, fresh noise; "
        f"{comparison.better:.0%} score higher than the base on the same noise)",
    ]
