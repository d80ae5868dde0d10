"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 2 the user's mistake, said in one line each, without a traceback; 1 a run that had to stop (in one
line) or a fault of ours (with a traceback); 130 interrupted, with the line that resumes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import difftune

if TYPE_CHECKING:
    from torch import Tensor

    from difftune.config import RunConfig, SamplerConfig
    from difftune.prompts import Prompt
    from difftune.tracking import Comparison, Progress
    from difftune.types import Metrics

app = typer.Typer(
    name="difftune",
    help="Fine-tune diffusion and flow models with rewards: prompts in, a stock LoRA file out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(help="A YAML file, a recipe (difftune list recipes) or a run's folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. train.epochs=10 algorithm.lr=1e-4.")
]
Adapter = Annotated[Path, typer.Argument(help="An adapter's folder or file, or the folder of the run that made it.")]
Model = Annotated[str | None, typer.Option(help="Base model; the one named in the adapter by default.")]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file with rewards or algorithms.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    # transformers reports every image class that torchvision, which nothing here needs, could have served; diffusers
    # reports that a LoRA of the denoiser has no keys for the text encoder.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        app(args=None if argv is None else list(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
        return code
    return 0


def _explain(error: Exception) -> int | None:
    """Say in plain lines what is wrong and return the exit code; ``None`` for what is our fault."""
    from pydantic import ValidationError

    from difftune.registry import RegistryError

    if isinstance(error, ValidationError):
        for item in error.errors():
            _complain(f"{'.'.join(map(str, item['loc']))}: {item['msg']}")
        return 2
    # Our own errors live beside tensors: whoever raised one has imported them.
    types = sys.modules.get("difftune.types")
    if isinstance(error, (RegistryError, FileNotFoundError)) or (types and isinstance(error, types.UserError)):
        _complain(str(error))
        return 2
    if isinstance(error, OSError) and error.errno in _DISK:
        _complain(f"{error.strerror}: {error.filename or 'writing failed'}; what was saved before is intact")
        return 1
    if type(error).__name__ in _STOPS:
        _complain(str(error).strip().splitlines()[0] + _STOPS[type(error).__name__])
        return 1
    return None


#: What a disk may refuse; nothing in the program can mend it.
_DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}

#: Errors that stop a run for a reason the user can act on, by name (their modules import torch), and what to do.
_STOPS = {
    "NonFiniteError": "",
    "ParityError": "",
    "CheckpointError": "",
    "OutOfMemoryError": "; lower sampler.batch_size and train.micro_batch, or set gradient_checkpointing: true",
}


def _clean(text: str) -> str:
    """Drop control characters: names and prompts are data, and must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def _say(text: str = "") -> None:
    typer.echo(_clean(text))


def _complain(text: str) -> None:
    for line in _clean(text).splitlines():
        typer.echo(f"difftune: {line}", err=True)


# -- interruption ----------------------------------------------------------------------------------------------------


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _leave_on_second(reading: int) -> None:
    """Read the numbers of the signals that arrive, until the pipe is closed; the second one ends the process."""
    count = 0
    with open(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            count += number[0] in _SIGNALS
            if count == 2:
                os._exit(130)


class _Interrupts:
    """SIGINT and SIGTERM: the first one stops the run at its next boundary, a second one leaves at once.

    Handlers run between two lines of Python. A scorer that hangs or a long computation would keep the second signal
    waiting, so a thread counts them as they come in and leaves by itself.
    """

    def __init__(self) -> None:
        self.requested = False
        self._held = False
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def __enter__(self) -> _Interrupts:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
            reading, writing = self._pipe = os.pipe()
            os.set_blocking(writing, False)
            self._wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=_leave_on_second, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self, hold: bool = True) -> Iterator[None]:
        """Let a signal wait: within the block it is only noted. ``hold=False`` lets it through again."""
        before, self._held = self._held, hold
        try:
            yield
        finally:
            self._held = before

    def check(self) -> None:
        """Raise what was held back, or what an unraisable place has swallowed."""
        if self.requested:
            raise KeyboardInterrupt


# -- train and demo --------------------------------------------------------------------------------------------------


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
) -> None:
    """Train a LoRA by reward and save it, with metrics, sample grids and a report."""
    from difftune.config import load_config

    settings = [*(overrides or []), *([f"out={_quoted(out)}"] if out is not None else [])]
    raise typer.Exit(_train(load_config(config, settings), resume))


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/demo, or the next that is free.")] = None,
) -> None:
    """Train the embedded model for a few minutes, offline, and show before and after."""
    from difftune.config import load_config
    from difftune.doctor import cores

    folder = out if out is not None else _free_folder(Path("runs/demo"))
    # More threads than a small model can use only wait for one another.
    settings = [f"threads={min(cores(), 4)}", *(overrides or []), f"out={_quoted(folder)}"]
    raise typer.Exit(_train(load_config("demo", settings), resume=False))


def _quoted(path: Path) -> str:
    import json

    return json.dumps(str(path))


def _free_folder(folder: Path) -> Path:
    """Return ``folder``, or ``folder-2``, ``folder-3``, ... if it is there already."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _train(config: RunConfig, resume: bool) -> int:
    """Run a configuration to its end and return the exit code."""
    out = Path(config.out or "runs/run")
    _claim(out, config, resume)
    again = f"difftune train {out} --resume"
    with _Interrupts() as interrupts:
        try:
            _run_epochs(config, resume, interrupts)
            comparison = None if config.evaluate is None else _evaluate_run(out, config)
        except KeyboardInterrupt:
            _complain(f"interrupted; resume with: {again}")
            return 130
        except Exception as error:
            code = _explain(error)
            if code == 1:
                _complain(f"{_last_checkpoint(out)}; resume with: {again} (settings that alter results need a new run)")
            if code is None:
                raise
            return code
    if os.environ.get("RANK", "0") == "0":
        _tell_results(out, comparison)
    return 0


def _last_checkpoint(out: Path) -> str:
    from difftune.checkpoint import checkpoints

    found = checkpoints(out / "checkpoints")
    return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint yet"


def _claim(out: Path, config: RunConfig, resume: bool) -> None:
    """Write ``config.yaml`` into the run's folder, unless that folder is another run's."""
    from difftune.checkpoint import checkpoints, write_atomically
    from difftune.config import changed_keys, read_yaml, resolve, to_yaml
    from difftune.types import UserError

    file = out / "config.yaml"
    if resume:
        if not out.is_dir():
            raise UserError(f"resume: {out} does not exist; start the run without --resume")
        changed = changed_keys(read_yaml(file), resolve(config)) if file.is_file() else []
        if changed:
            raise UserError(
                f"resume: {', '.join(changed)} differ from the run in {out} and would alter its results; resume with "
                f"difftune train {out} --resume, or start a new run with --out"
            )
    elif (out / "metrics.jsonl").exists() or checkpoints(out / "checkpoints"):
        raise UserError(
            f"out: {out} already holds a run; go on with difftune train {out} --resume, or choose another with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, to_yaml(resolve(config)))


def _run_epochs(config: RunConfig, resume: bool, interrupts: _Interrupts) -> None:
    """Build, train and save."""
    from difftune.config import build

    out = Path(config.out or "")
    _say(f"loading {config.model.id}; the run is in {out}")
    run = build(config)
    trainer = run.trainer(resume=resume, listener=lambda *phase: None)
    progress = _progress(trainer, config)

    def listen(phase: str, done: int, total: int) -> None:
        interrupts.check()
        progress.phase(phase, done, total)

    trainer.listener = listen
    if trainer.epoch:
        _say(f"resumed after epoch {trainer.epoch}")
    with progress, interrupts.held():
        if config.train.sample_every and not trainer.epoch:
            progress.phase("samples of the base model", 0, 0)
        for metrics in _epochs(trainer, interrupts, progress):
            progress.finished(metrics)
        trainer.save()
    interrupts.check()


def _epochs(trainer: Any, interrupts: _Interrupts, progress: Progress) -> Iterator[Metrics]:
    """Iterate over the trainer, and let signals through to it alone: it saves what it is before it gives up."""
    iterator = iter(trainer)
    # The clock of the first epoch starts after the base model's samples, with the first phase that is reported.
    listen, begun = trainer.listener, False

    def begin(*phase: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            progress.begin()
        listen(*phase)

    trainer.listener = begin
    while True:
        try:
            with interrupts.held(False):
                interrupts.check()
                metrics = next(iterator, None)
        except KeyboardInterrupt:
            # It may have come just before the trainer went on: told now, it saves; told a second time, it is silent.
            with contextlib.suppress(KeyboardInterrupt):
                iterator.throw(KeyboardInterrupt())
            raise
        if metrics is None:
            return
        yield metrics


def _progress(trainer: Any, config: RunConfig) -> Progress:
    from rich.console import Console

    from difftune.tracking import LiveProgress, Progress

    console = Console()
    sizes = (config.train.epochs, config.train.sample_every, trainer.epoch)
    if not trainer.accelerator.is_main_process:
        return Progress(*sizes, write=lambda line: None)
    return LiveProgress(*sizes, console) if console.is_terminal else Progress(*sizes, write=_say)


def _evaluate_run(out: Path, config: RunConfig) -> Comparison | None:
    """Evaluate the saved file with the stock pipeline; write the figures and the pictures, and the report again."""
    import json

    from difftune.checkpoint import write_atomically
    from difftune.config import load_held_out
    from difftune.report import write_report

    if os.environ.get("RANK", "0") != "0" or config.evaluate is None:
        return None
    prompts = load_held_out(config.prompts)
    comparison = _compare(out / "adapter", config, prompts, config.evaluate.samples)
    write_atomically(out / "summary.json", json.dumps(comparison.summary(), indent=2) + "\n")
    _write_pairs(comparison.base, comparison.tuned, comparison.prompts, out / "before_after.png")
    write_report(out)
    return comparison


def _compare(adapter: Path, config: RunConfig, prompts: Sequence[Prompt], samples: int) -> Comparison:
    """Draw base and tuned with the stock pipeline and score them as the run did."""
    from difftune.config import EvaluateConfig, load_model, load_reward, pick_device
    from difftune.export import load_adapter
    from difftune.tracking import compare, repeat_prompts

    evaluate = config.evaluate or EvaluateConfig.model_validate({})
    device = pick_device(config.device)
    pipe = load_model(config.model).to(device)
    return compare(
        pipe,
        lambda: load_adapter(pipe, adapter),
        load_reward(config.reward).to(device),
        repeat_prompts(prompts, samples),
        seed=evaluate.seed,
        steps=evaluate.steps or config.sampler.steps,
        guidance_scale=config.sampler.guidance_scale if evaluate.guidance_scale is None else evaluate.guidance_scale,
        batch_size=config.sampler.batch_size,
        call={**_call_of(config.sampler), **evaluate.call},
        progress=_phase_lines("held-out pictures"),
    )


def _call_of(sampler: SamplerConfig) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that a sampler's settings stand for."""
    wanted = {name: getattr(sampler, name) for name in ("height", "width", "negative_prompt")}
    return {**{name: value for name, value in wanted.items() if value is not None}, **sampler.call}


def _phase_lines(what: str) -> Any:
    """Return a progress callback that prints one line per phase, at its end."""

    def tell(phase: str, done: int, total: int) -> None:
        if done == total:
            _say(f"{what}: {total} of the {phase} model")

    return tell


def _write_pairs(base: Tensor, tuned: Tensor, prompts: Sequence[str], path: Path, limit: int = 16) -> Path:
    """Write base pictures above tuned ones, eight to a row."""
    import torch

    from difftune.report import sample_grid

    base, tuned, prompts = _stills(base[:limit]), _stills(tuned[:limit]), list(prompts[:limit])
    columns = min(8, len(base))
    rows, captions = [], []
    for start in range(0, len(base), columns):
        chunk = slice(start, start + columns)
        blank = torch.ones(columns - len(base[chunk]), *base.shape[1:])
        for name, images in (("base", base), ("tuned", tuned)):
            rows.append(torch.cat([images[chunk], blank]))
            captions += [f"{name}: {text or '(empty)'}" for text in prompts[chunk]] + [" "] * len(blank)
    return sample_grid(torch.cat(rows), columns, path=path, captions=captions)


def _stills(images: Tensor) -> Tensor:
    return images if images.ndim == 4 else images[:, 0]


def _command() -> str:
    """Return how this command can be called again: by its name if a shell finds it, else by its path."""
    if shutil.which("difftune"):
        return "difftune"
    here = Path(sys.argv[0])
    if here.name != "difftune":
        return "python -m difftune.cli"
    with contextlib.suppress(ValueError):
        return str(here.absolute().relative_to(Path.cwd()))
    return str(here)


def _tell_results(out: Path, comparison: Comparison | None) -> None:
    _say()
    for line in _reward_lines(out, comparison):
        _say(line)
    grid = out / "before_after.png"
    if comparison is None:
        grid = max((out / "samples").glob("epoch_*.png"), default=grid)
    places = {"adapter": out / "adapter", "pictures": grid, "report": out / "report.html"}
    for name, path in places.items():
        if path.exists():
            _say(f"{name:<9}{path}")
    command = _command()
    following = {
        f"{command} generate {out} --compare": "more pictures, base beside tuned; your own: --prompt '...'",
        f"{command} evaluate {out} -n 128": "the figures again, on more pictures",
        f"{command} new ddpo-scene-tiny-sd my.yaml": "a recipe to change; all of them: difftune list recipes",
    }
    width = max(map(len, following))
    _say("next:")
    for command, purpose in following.items():
        _say(f"  {command:<{width}}  # {purpose}")


def _reward_lines(out: Path, comparison: Comparison | None) -> list[str]:
    import json

    lines = []
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rewards = [record["reward/mean"] for record in records if "reward/mean" in record]
    if rewards:
        lines.append(f"reward in training: {rewards[0]:.4g} in the first epoch, {rewards[-1]:.4g} in the last")
    if comparison is not None:
        lines += _comparison_lines(comparison)
    return lines


def _comparison_lines(comparison: Comparison) -> list[str]:
    figures = comparison.summary()
    before, after = figures["before"], figures["after"]
    distinct = len(set(comparison.prompts))
    return [
        f"held out: {before['reward/mean']:.4g} ± {before['reward/std']:.2g} before, {after['reward/mean']:.4g} ± "
        f"{after['reward/std']:.2g} after: {comparison.gain:+.2f} standard deviations of the base",
        f"({len(comparison.prompts)} pictures each of {distinct} prompts, stock pipeline, the saved file, fresh noise; "
        f"{comparison.better:.0%} score higher than the base on the same noise)",
    ]


# -- check -----------------------------------------------------------------------------------------------------------


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate a configuration, load it and run one real cycle: seconds, memory, and what the run will take."""
    from difftune.config import load_config
    from difftune.doctor import preflight

    loaded = load_config(config, overrides or [])
    _say(f"configuration is valid; loading {loaded.model.id}")
    for line in preflight(loaded).lines():
        _say(line)


# -- adapters --------------------------------------------------------------------------------------------------------


def _locate(adapter: Path) -> Path:
    """Return the adapter's folder or file: also when a run's folder is named."""
    from difftune.types import UserError

    if (adapter / "adapter").is_dir():
        return adapter / "adapter"
    if not adapter.exists():
        raise UserError(f"no adapter at {str(adapter)!r}: expected a folder or a .safetensors file")
    return adapter


def _settings(adapter: Path) -> dict[str, Any]:
    """Return the configuration an adapter was made with: its run's ``config.yaml``, else what its header says.

    Plug-ins named there are left out: they run only when the command line or a configuration of the user's names them.
    """
    import json

    from difftune.config import read_yaml
    from difftune.export import inspect_adapter
    from difftune.types import UserError

    folder = adapter if adapter.is_dir() else adapter.parent
    # Only a run's own adapter: a file that merely lies beside some run says itself what it was made with.
    if folder.name == "adapter" and (folder.parent / "config.yaml").is_file():
        settings = read_yaml(folder.parent / "config.yaml")
    else:
        header = inspect_adapter(adapter)["metadata"]
        try:
            settings = dict(json.loads(header.get("difftune.config", "{}")))
        except (ValueError, TypeError):
            raise UserError(f"{adapter}: the settings in its header are no JSON; give --model and --prompts") from None
        if "model" not in settings and "difftune.base_model" in header:
            settings["model"] = {"id": header["difftune.base_model"]}
    settings.pop("plugins", None)
    return settings


def _model_of(settings: Mapping[str, Any], model: str | None) -> Any:
    from difftune.policy import ModelConfig
    from difftune.types import UserError

    if model is not None:
        return ModelConfig.model_validate({"id": model})
    if "model" not in settings:
        raise UserError("the adapter does not name its base model; give it with --model")
    return ModelConfig.model_validate(settings["model"])


def _asked_prompts(prompt: list[str] | None, prompts: str | None, settings: Mapping[str, Any]) -> list[Prompt]:
    """Return the prompts of the command line, else those the run held out."""
    from difftune.config import PromptsConfig, load_held_out
    from difftune.prompts import Prompt, load_prompts
    from difftune.types import UserError

    if prompt:
        return [Prompt(text) for text in prompt]
    if prompts is not None:
        return load_prompts(prompts)
    if "prompts" not in settings:
        raise UserError("no prompts: give --prompt 'two stars' or --prompts FILE")
    return load_held_out(PromptsConfig.model_validate(settings["prompts"]))


@app.command()
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
    from difftune.report import sample_grid
    from difftune.tracking import draw

    source = _locate(adapter)
    settings = _settings(source)
    sampler = SamplerConfig.model_validate(settings.get("sampler") or {})
    trained = "sampler" in settings
    # Eight of the run's own prompts are enough to look at.
    texts = [entry.text for entry in _asked_prompts(prompt, prompts, settings)][: None if prompt or prompts else 8]
    texts = [text for text in texts for _ in range(number)]
    pipe = load_model(_model_of(settings, model)).to(pick_device(device))
    drawing: dict[str, Any] = {
        "seed": seed,
        "steps": steps or (sampler.steps if trained else None),
        "guidance_scale": sampler.guidance_scale if guidance is None else guidance,
        "batch_size": sampler.batch_size,
        "call": _call_of(sampler),
    }
    base = draw(pipe, texts, **drawing) if compare else None
    load_adapter(pipe, source)
    tuned = draw(pipe, texts, **drawing)
    folder = out if out is not None else _free_folder(Path("generated"))
    _write_pictures(tuned, folder, "" if base is None else "_tuned")
    if base is None:
        grid = sample_grid(_stills(tuned), min(8, len(tuned)), path=folder / "grid.png", captions=texts)
    else:
        _write_pictures(base, folder, "_base")
        grid = _write_pairs(base, tuned, texts, folder / "grid.png", limit=64)
    _say(f"{len(tuned)} pictures in {folder}, together in {grid}")


def _write_pictures(images: Tensor, folder: Path, suffix: str) -> None:
    """Write one PNG per picture; the frames of a video become a folder of them."""
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()
    for index, picture in enumerate(pixels):
        frames = {f"{index:03d}{suffix}.png": picture}
        if picture.ndim == 4:
            frames = {f"{index:03d}{suffix}/{number:04d}.png": frame for number, frame in enumerate(picture)}
        for name, frame in frames.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(folder / name)


@app.command()
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

    source = _locate(adapter)
    settings = _settings(source)
    if reward is None and "reward" not in settings:
        raise UserError("the adapter does not name its reward; give it with --reward")
    asked = {"seed": seed, "steps": steps, "guidance_scale": guidance}
    config = validate(
        {
            "model": _model_of(settings, model).model_dump(),
            "reward": settings.get("reward") if reward is None else reward,
            "sampler": settings.get("sampler") or {},
            "prompts": (settings.get("prompts") or [""]) if prompts is None else prompts,
            "evaluate": {**(settings.get("evaluate") or {}), **{k: v for k, v in asked.items() if v is not None}},
            "plugins": [str(path) for path in plugin or []],
            "device": device,
            # Nothing is trained: the algorithm is only what a configuration cannot do without.
            "algorithm": "ddpo",
        },
        trains=False,
    )
    entries = _asked_prompts(None, prompts, settings)
    comparison = _compare(source, config, entries, number)
    figures = comparison.summary()
    names = list(figures["before"])
    width = max(map(len, names))
    _say(f"{'':<{width}}  {'base':>10}  {'tuned':>10}")
    for name in names:
        _say(f"{name:<{width}}  {figures['before'][name]:>10.4f}  {figures['after'][name]:>10.4f}")
    for line in _comparison_lines(comparison):
        _say(line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(figures, indent=2) + "\n")
        _say(f"written to {out}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA file, an adapter's folder or a run's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what is in a LoRA file and which programs will load how much of it."""
    import json

    from difftune.export import inspect_adapter

    found = inspect_adapter(_locate(file))
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    keys = ("file", "format", "family", "components", "layers", "tensors", "parameters", "dtypes", "ranks", "scales")
    for key in keys:
        value = found[key]
        _say(f"{key:<11}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    _say(f"{'norm':<11}{found['norm']:.6g}{'' if found['finite'] else '  NOT FINITE'}")
    for program, loader in found["loaders"].items():
        note = f" ({loader['note']})" if loader["note"] else ""
        _say(f"{program:<11}{loader['matched']} of {loader['total']} layers{note}")
    for key in ("difftune.base_model", "difftune.rewards", "difftune.algorithm", "difftune.epoch", "difftune.version"):
        if key in found["metadata"]:
            _say(f"{key.removeprefix('difftune.'):<11}{found['metadata'][key]}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html again: reward curve, before and after, in one file."""
    from difftune.report import write_report
    from difftune.types import UserError

    if not (run / "metrics.jsonl").is_file() and not (run / "config.yaml").is_file():
        raise UserError(f"{str(run)!r} is no run's folder: expected one with metrics.jsonl")
    _say(str(write_report(run)))


@app.command()
def export(
    adapter: Adapter,
    layout: Annotated[str, typer.Option("--format", help="diffusers, or kohya (ComfyUI, A1111).")],
    out: Annotated[Path, typer.Option(help="A folder, or a file ending in .safetensors.")],
    model: Model = None,
) -> None:
    """Write a LoRA in the layout another program reads; its base model is loaded to match the keys."""
    import json

    from difftune.config import base_model_name, load_model
    from difftune.export import WEIGHTS, inspect_adapter, load_adapter, save_adapter
    from difftune.types import UserError

    if layout not in ("diffusers", "kohya"):
        raise UserError(f"--format: got {layout!r}, expected diffusers or kohya")
    source = _locate(adapter)
    settings = _settings(source)
    base = _model_of(settings, model)
    pipe = load_model(base)
    load_adapter(pipe, source, "default")
    header = inspect_adapter(source)["metadata"]
    name = out.stem if out.suffix == ".safetensors" else header.get("difftune.name", "adapter")
    with tempfile.TemporaryDirectory(prefix="difftune-export-") as stage:
        files = save_adapter(
            pipe,
            "default",
            stage,
            config=json.loads(header.get("difftune.config", "{}")),
            metadata={key: value for key, value in header.items() if key.startswith("difftune.")},
            base_model=base_model_name(base),
            name=name,
        )
        wanted = [file for file in files if file.name == WEIGHTS or file.name.endswith("_kohya.safetensors")]
        wanted = [file for file in wanted if file.name.endswith("_kohya.safetensors") == (layout == "kohya")]
        if not wanted:
            raise UserError(f"--format {layout}: {type(pipe).__name__} has no such layout (kohya's is for UNets)")
        target = out if out.suffix == ".safetensors" else out / wanted[0].name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wanted[0], target)
    _say(str(target))


# -- scoring ---------------------------------------------------------------------------------------------------------

#: Largest picture that is decoded: 64 million pixels.
MAX_PIXELS = 64_000_000


@app.command()
def score(
    reward: Annotated[str, typer.Argument(help="A reward's name (difftune list rewards).")],
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WEBP files, or folders of them.")],
    prompts: Annotated[str | None, typer.Option(help="A prompt file, one line per picture in their order.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the reward, KEY=VALUE.")] = None,
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Score pictures."""
    import csv
    import json

    from difftune.prompts import Prompt, load_prompts
    from difftune.registry import load_plugin
    from difftune.types import UserError

    for file in plugin or []:
        load_plugin(file)
    scorer = _scorer(reward, settings or [])
    files = _picture_files(images)
    entries = [Prompt(prompt or "")] * len(files) if prompts is None else load_prompts(prompts)
    if len(entries) != len(files):
        raise UserError(f"--prompts: {prompts} has {len(entries)} prompts for {len(files)} pictures, expected as many")
    rows = []
    for file, entry in zip(files, entries, strict=True):
        # One at a time: pictures from outside come in all sizes.
        out = scorer(_read_picture(file), [entry.text], [entry.metadata])
        parts = {name: float(value[0]) for name, value in out.parts.items()}
        rows.append({"image": str(file), "prompt": entry.text, "score": float(out.total[0]), **parts})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif as_csv:
        fields = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(sys.stdout, list(fields))
        writer.writeheader()
        # A terminal must not be steered by a prompt; a file gets the prompt as it is.
        tame = _clean if sys.stdout.isatty() else str
        writer.writerows({k: tame(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows)
    else:
        for row in rows:
            extra = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in _ROW)
            _say(f"{row['score']:>10.4f}  {row['image']}  {extra}".rstrip())
        scores = [float(str(row["score"])) for row in rows]
        if len(scores) > 1:
            _say(f"{sum(scores) / len(scores):>10.4f}  mean of {len(scores)}")


_ROW = ("image", "prompt", "score")


def _scorer(reward: str, settings: Sequence[str]) -> Any:
    from difftune.config import load_reward, parse_yaml
    from difftune.types import UserError

    spec: dict[str, Any] = {"name": reward}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set: got {setting!r}, expected KEY=VALUE")
        spec.update(parse_yaml(f"{key}: {value}", "--set"))
    return load_reward(spec)


def _picture_files(paths: Sequence[Path]) -> list[Path]:
    """Return the picture files, those of folders in the order of their names."""
    from difftune.types import UserError

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"picture {str(path)!r} does not exist")
    if not files:
        raise UserError(f"no pictures in {', '.join(map(str, paths))}: expected PNG, JPEG or WEBP files")
    return files


def _read_picture(path: Path) -> Tensor:
    """Return a picture as ``(1, 3, H, W)`` in [0, 1]; its size is looked at before it is decoded."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from difftune.types import UserError

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"picture {str(path)!r} is {image.width} x {image.height}, expected at most {MAX_PIXELS:,} pixels"
                )
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {str(path)!r} cannot be read as PNG, JPEG or WEBP ({error})") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


# -- looking around --------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="algorithms, rewards, models or recipes.")],
    plugin: Plugins = None,
) -> None:
    """List what there is to choose from."""
    from difftune.registry import load_plugin, nearest
    from difftune.types import UserError

    listings = {"algorithms": _algorithms, "rewards": _rewards, "models": _models, "recipes": _recipes}
    if what not in listings:
        raise UserError(f"list: got {what!r}{nearest(what, list(listings))}, expected {', '.join(listings)}")
    for file in plugin or []:
        load_plugin(file)
    rows = listings[what]()
    width = max((len(name) for name, _ in rows), default=0)
    for name, description in rows:
        _say(f"{name:<{width}}  {description}")


def _algorithms() -> list[tuple[str, str]]:
    from difftune.algorithm import ALGORITHMS

    return [(name, f"{ALGORITHMS.get(name).paper} (needs {ALGORITHMS.get(name).evidence})") for name in ALGORITHMS]


def _rewards() -> list[tuple[str, str]]:
    from difftune.config import first_line
    from difftune.reward import REWARDS, reward_settings

    rows = []
    for name in REWARDS:
        builder = REWARDS.get(name)
        gradient = " Differentiable." if getattr(builder, "differentiable", False) else ""
        settings = ", ".join(reward_settings(name))
        rows.append((name, f"{first_line(builder)}{gradient}{f' Settings: {settings}.' if settings else ''}"))
    return rows


def _models() -> list[tuple[str, str]]:
    from difftune.zoo import MODELS

    more = ("(any other)", "a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or a folder in its layout")
    return [*((name, model.description) for name, model in MODELS.items()), more]


def _recipes() -> list[tuple[str, str]]:
    from difftune.config import recipes

    return list(recipes().items())


@app.command()
def new(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (difftune list recipes).")],
    file: Annotated[Path | None, typer.Argument(help="The file to write; RECIPE.yaml by default.")] = None,
) -> None:
    """Copy a recipe, comments included, to start from."""
    from difftune.config import recipe_text
    from difftune.types import UserError

    text = recipe_text(recipe)
    target = file if file is not None else Path(f"{recipe}.yaml")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise UserError(f"{str(target)!r} exists already; choose another name") from None
    _say(f"wrote {target}; try it with: difftune check {target}")


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None) -> None:
    """Print the JSON schema of a configuration.

    Editors complete and check a YAML file that begins with # yaml-language-server: $schema=FILE
    """
    import json

    from difftune.config import json_schema

    text = json.dumps(json_schema(), indent=2)
    if out is None:
        typer.echo(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    _say(f"wrote {out}; first line of a configuration: # yaml-language-server: $schema={out}")


@app.command()
def doctor() -> None:
    """Look at versions, device, memory, extras and tokens, and say what to do about what is missing."""
    from difftune.doctor import environment, table

    _say(f"difftune {difftune.__version__}")
    for line in table(environment()):
        _say(line)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"difftune {difftune.__version__}")
        raise typer.Exit()


if __name__ == "__main__":
    sys.exit(main())
