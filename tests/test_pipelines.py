"""The matrix: one suite over many pipeline classes, none of which difftune has a line of code for.

Each row is measured and compared with its row in docs/pipelines.md. To write the page from a run::

    DIFFTUNE_WRITE_TABLE=1 python -m pytest tests/test_pipelines.py
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from pipelines import CASES, PROMPTS, Case
from pipelines.parts import exported

from difftune.export import load_adapter, save_adapter
from difftune.policy import LoraConfig, Policy
from difftune.quirks import QUIRKS
from difftune.sampler import PointView, Sampler, StepView, keyed_generator, to_images
from difftune.types import Trajectory, UserError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "pipelines.md"
WRITING = os.environ.get("DIFFTUNE_WRITE_TABLE") == "1"



@dataclasses.dataclass(frozen=True)
class Row:
    """What one class was measured to do; the cells of its row."""

    steps: str
    ratio: str
    gradients: str
    window: str
    probe: str
    backprop: str
    lora: str
    remarks: str

    @property
    def cells(self) -> list[str]:
        return list(dataclasses.astuple(self))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Tiny models make diffusers and transformers warn of sizes and truncated prompts."""
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity_warning()
    diffusers.logging.set_verbosity_warning()


def policy_of(case: Case) -> Policy:
    """A policy whose LoRA already does something."""
    policy = Policy(case.build(), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return policy


class Calls:
    """Counts the denoisers' forward passes below the tap, by the step they belong to."""

    def __init__(self, sampler: Sampler) -> None:
        self.steps: list[int] = []
        self._state = sampler._puppet._difftune
        for module in sampler.policy.denoisers.values():
            self._count(module)

    def _count(self, module: torch.nn.Module) -> None:
        original = module.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.steps.append(self._state.index)
            return original(*args, **kwargs)

        vars(module)["forward"] = counted

    def taken(self) -> list[int]:
        steps, self.steps = self.steps, []
        return steps


def measure_gradients(sampler: Sampler, trajectory: Trajectory) -> tuple[str, str, list[str]]:
    """Replay every noisy step: |ratio - 1|, and the layers a gradient reaches. Nothing else may get one."""
    errors = []

    def backward(view: StepView) -> None:
        errors.append(float(((view.log_prob - view.old_log_prob).detach().exp() - 1).abs().max()))
        (view.log_prob.sum() * view.dims**0.5).backward()

    sampler.replay(trajectory, backward)
    assert len(errors) == len(trajectory.stochastic_steps) > 0
    trained = sampler.policy.named_parameters()
    own = {id(parameter) for parameter in trained.values()}  # a ControlNet may hold layers of the denoiser
    for component, module in sampler.policy.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for name, parameter in module.named_parameters():
                assert parameter.grad is None or id(parameter) in own, f"a gradient reaches {component}.{name}"
    reached: dict[str, float] = {}
    for name, parameter in trained.items():
        layer = name.split(".lora_")[0]
        reached[layer] = reached.get(layer, 0.0) + (0.0 if parameter.grad is None else float(parameter.grad.norm()))
        parameter.grad = None
    silent = [layer for layer, norm in reached.items() if not norm > 0]
    ratio = f"{max(errors):.0e}" if max(errors) else "0"
    return ratio, f"{len(reached) - len(silent)}/{len(reached)}", silent


def measure_window(sampler: Sampler, trajectory: Trajectory, calls: Calls, recorded: list[int]) -> str:
    """Replay the middle noisy step alone: the denoiser runs as often as that step ran it, and never elsewhere."""
    steps = trajectory.stochastic_steps
    middle = steps[len(steps) // 2]
    calls.taken()
    alone: list[StepView] = []
    sampler.replay(trajectory, alone.append, steps=[middle])
    taken = calls.taken()
    assert torch.equal(alone[0].log_prob.detach(), alone[0].old_log_prob), "a step replayed alone has another log-prob"
    # A class that cannot do without the skipped steps runs them, without gradients.
    expected = [step for step in recorded if step == middle or (step < middle and not sampler._skips)]
    assert taken == expected, f"replaying step {middle} ran the denoiser at {taken}, expected {expected}"
    return f"{len(taken)} of {len(recorded)}"


def measure_probe(sampler: Sampler, trajectory: Trajectory) -> str:
    """At a recorded (x_t, t) the probe says what the replay said; x0 and noise make up x_t at any point."""
    step = trajectory.stochastic_steps[-1]
    replayed: list[StepView] = []
    sampler.replay(trajectory, replayed.append, steps=[step], grad=False)
    points = [(float(trajectory.times[step]), trajectory.states[:, step])]
    points.append((sampler.timestep(0.4), trajectory.states[:, step]))
    seen: list[PointView] = []
    sampler.probe(
        trajectory.prompts, points, seen.append, keys=trajectory.keys, conditions=trajectory.conditions, grad=False
    )
    assert [view.index for view in seen] == [0, 1]
    for view in seen:
        whole = view.level.alpha * view.x0 + view.level.sigma * view.noise
        clips = sampler._puppet.config.get("clip_sample") or sampler._puppet.config.get("thresholding")
        if not clips and sampler.dynamics != "lcm":
            torch.testing.assert_close(whole, view.x_t.float(), atol=1e-3, rtol=1e-3)
    scale = float(replayed[0].x0.abs().max())
    error = float((seen[0].x0 - replayed[0].x0).abs().max()) / max(scale, 1e-6)
    return "yes" if error < 1e-4 else "up to noise of the pipeline's own" if error < 0.5 else f"off by {error:.1g}"


def in_fp64(sampler: Sampler) -> Any:
    """Put the pipeline into fp64 for finite differences, where its code lets itself be; return how to go back."""
    modules = [m for m in sampler.policy.pipe.components.values() if isinstance(m, torch.nn.Module)]
    for module in modules:
        module.to(torch.float64)
    sampler._cache.clear()
    sampler._tap._shapes.clear()

    def back() -> None:
        for module in modules:
            module.to(torch.float32)
        sampler._cache.clear()
        sampler._tap._shapes.clear()

    return back


def measure_backprop(sampler: Sampler, trajectory: Trajectory) -> str:
    """The gradient of the decoded samples against a finite difference along it, in fp64 where the class can."""
    back = in_fp64(sampler)
    try:
        try:
            return compare_backprop(sampler, trajectory, (1e-3, 1e-2, 1e-4, 1e-1, 0.2, 0.4, 1e-5, 1.0))
        except (RuntimeError, TypeError, AssertionError):  # a dtype is written into the pipeline
            back()
            return compare_backprop(sampler, trajectory, (1e-2, 1e-3, 1e-1))
    except UserError as error:
        assert "decodes by numpy" in str(error)
        return "no: decoded by numpy"
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return "no: decoded in place"
    finally:
        back()


def compare_backprop(sampler: Sampler, trajectory: Trajectory, sizes: tuple[float, ...]) -> str:
    weight: torch.Tensor | None = None

    def value(grad: bool) -> torch.Tensor:
        nonlocal weight
        images = sampler.backprop(
            trajectory.prompts,
            keys=trajectory.keys,
            conditions=trajectory.conditions,
            checkpointing=False,
            grad_steps=None if grad else [],
        )
        if weight is None:
            weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (images.double() * weight).sum()

    loss = value(True)
    if not loss.requires_grad:
        return "no: decoded without a graph"
    parameters = sampler.policy.parameters()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = float(sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5)
    assert norm > 0
    saved = [p.detach().clone() for p in parameters]

    def difference(size: float) -> float:
        values = []
        for sign in (1, -1):
            for parameter, start, grad in zip(parameters, saved, grads, strict=True):
                parameter.data = start if grad is None else start + sign * size * grad / norm
            with torch.no_grad():
                values.append(float(value(False).detach()))
        return (values[0] - values[1]) / (2 * size)

    errors = []
    for size in sizes:
        errors.append(abs(difference(size) / norm - 1))
        if errors[-1] < 0.03:
            break
    for parameter, start in zip(parameters, saved, strict=True):
        parameter.data = start
    if min(errors) < 0.03:
        return "yes"
    if all(abs(error - 1) < 0.1 for error in errors) and quantizes(sampler.policy.pipe):
        # Nearest entries of a codebook do not move with the latents; the gradient is the straight-through one.
        return "no: rounded to a codebook"
    return f"off by {min(errors):.1g}"


def quantizes(pipe: Any) -> bool:
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    return any(type(module).__name__ == "VectorQuantizer" for module in modules)


def measure_lora(case: Case, sampler: Sampler, trajectory: Trajectory, folder: Path) -> str:
    """Save the adapter, load it into a fresh pipeline, and call both as a user would: the same output."""
    pipe = sampler.policy.pipe
    save_adapter(pipe, "default", folder, config={}, metadata={}, base_model="tiny", name="tiny")
    fresh = case.build()
    try:
        load_adapter(fresh, folder)
    except AttributeError as error:
        return f"no: its loader fails ({error})"
    with_loader = hasattr(fresh, "load_lora_weights")
    outputs: list[torch.Tensor] = []
    for one in (pipe, fresh):
        arguments = sampler._arguments(trajectory.prompts, trajectory.keys, trajectory.conditions, case.steps)
        given = sampler._in_form(sampler._form or 0, trajectory.keys, arguments, trajectory.conditions)
        if sampler._form:
            given["generator"] = keyed_generator(trajectory.keys[0], "stock")
        for module in one.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval()
        torch.manual_seed(0)
        outputs.append(to_images(one(**given), len(trajectory)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)
    return "stock loader" if with_loader else "peft layout"


def measure(case: Case, folder: Path) -> Row:
    sampler = Sampler(policy_of(case), steps=case.steps, eta=0.7, batch_size=case.batch, call=case.call)
    calls = Calls(sampler)
    trajectory = sampler.rollout(PROMPTS[: case.batch], conditions=case.conditions(case.batch))
    recorded = calls.taken()
    if sampler._output_type == "np":
        recorded = recorded[len(recorded) // 2 :]  # the class does not know "pt" and was called a second time
    ratio, gradients, silent = measure_gradients(sampler, trajectory)
    window = measure_window(sampler, trajectory, calls, recorded)
    probe = measure_probe(sampler, trajectory)
    backprop = measure_backprop(sampler, trajectory)
    for module in sampler.policy.denoisers.values():
        vars(module).pop("forward", None)
    lora = measure_lora(case, sampler, trajectory, folder)
    remarks = []
    if sampler._form:
        remarks.append(("", "one generator for all", "one sample a call")[sampler._form])
    elif case.batch == 1:
        remarks.append("one sample a call")
    if trajectory.kept is not None:
        remarks.append(f"overwrites {1 - float(trajectory.kept.float().mean()):.0%} between steps")
    elif trajectory.steps_out is not None:
        remarks.append("changes the sample between steps")
    if silent:
        remarks.append("no effect: " + ", ".join(f"`{name}`" for name in shortened(silent)))
    steps = f"{trajectory.num_steps} ({len(trajectory.stochastic_steps)})"
    return Row(steps, ratio, gradients, window, probe, backprop, lora, "; ".join(remarks))


def shortened(layers: list[str]) -> list[str]:
    """Layer names without the component, at most two."""
    names = [layer.split(".", 1)[-1] for layer in layers]
    return names if len(names) <= 2 else [names[0], f"... ({len(names)})"]


MEASURED: dict[str, Row] = {}
TRAINED = {name: case for name, case in CASES.items() if not case.refused}
REFUSED = {name: case for name, case in CASES.items() if case.refused}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if case.fast else pytest.mark.slow) for name, case in TRAINED.items()]
)
def test_a_pipeline_class_trains_unmodified(name: str, tmp_path: Path) -> None:
    row = MEASURED[name] = measure(CASES[name], tmp_path)
    if WRITING:
        write_page()
    assert row.ratio == "0"
    assert int(row.gradients.split("/")[0]) > 0
    assert "off" not in row.probe + row.backprop
    if not WRITING:
        assert committed()[name] == row.cells, "docs/pipelines.md is out of date: DIFFTUNE_WRITE_TABLE=1 writes it"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_runs(name: str) -> None:
    case = CASES[name]
    policy = Policy(case.build(), LoraConfig(rank=2))
    with pytest.raises(UserError, match=re.escape(case.refused)):
        Sampler(policy, steps=4)


# -- the page ----------------------------------------------------------------------------------------------------

HEAD = """# Pipelines

Which pipeline classes of diffusers {version} were driven by difftune, and what was measured on each. The page is
written by the test run (`DIFFTUNE_WRITE_TABLE=1 python -m pytest tests/test_pipelines.py`), and the tests fail when it
says anything else than they measure. The instances are tiny and random, in fp32 on a CPU; the classes are diffusers'
own. difftune has no code for any of them. Every pipeline class that diffusers exports is measured, refused, or listed
at the end with the reason why it is neither, which does not mean that it fails. (ONNX and modular pipelines, another
runtime and another interface, are left out.)

- **T**: denoising steps recorded (and how many carry noise).
- **|ratio - 1|**: the largest error of the probability ratio when an unchanged rollout is replayed.
- **layers**: adapted layers that a replay's gradient reaches, of all; nothing else gets one. Layers without effect on
  the output (a last block whose text stream is thrown away) are named under *remarks*.
- **window**: denoiser calls when one step is replayed, of the calls the rollout made.
- **probe**: the prediction at a recorded (x_t, t), asked for through the forward process, is the recorded one.
- **backprop**: the gradient from the decoded output to the weights agrees with a finite difference along it.
  "no" where the class decodes with numpy or in place, so that no graph leads back.
- **LoRA**: the saved file, loaded into a fresh pipeline, gives the same output. *stock loader*: by the class's own
  `load_lora_weights`; *peft layout*: the class has no loader, the file is in peft's layout, loaded by `load_adapter`.
- **remarks**: "overwrites 50% between steps" is what inpainting does with the region that is known: it is found by
  following the latents from one step to the next, and left out of the log-prob and the KL.
"""

COLUMNS = ["class", "T", "\\|ratio - 1\\|", "layers", "window", "probe", "backprop", "LoRA", "remarks"]


def class_of(name: str) -> str:
    return name.split(" ")[0]


def page(rows: dict[str, Row]) -> str:
    """Return the page for the measured rows."""
    lines = [HEAD.format(version=diffusers.__version__)]
    lines += [f"## Trained: {len({class_of(name) for name in rows})} classes, {len(rows)} rows", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join([name, *row.cells]) + " |" for name, row in rows.items()]
    lines += ["", "## Refused when the sampler is made", "", "| class | reason |", "| --- | --- |"]
    lines += [f"| {name} | {reason(name)} |" for name in REFUSED]
    lines += ["", "## Data that a pipeline cannot tell", ""]
    lines += ["Lines of `difftune/quirks.py` by family; families that are not listed need none.", ""]
    lines += ["| family | lines |", "| --- | --- |"]
    lines += [f"| {family} | {count} |" for family, count in quirk_lines().items()]
    if UNCOVERED:
        lines += ["", "## Not covered", "", *[f"- {why}: {names}" for why, names in uncovered().items()]]
    return "\n".join(lines) + "\n"


_UNBUILT = "no tiny instance has been built yet"
_TORCHVISION = "needs torchvision, which difftune does without"

#: Exported classes that have no row, and why; a name with more behind the class is a variant of one that has a row.
UNCOVERED = {
    **dict.fromkeys(
        (
            "AceStepPipeline AltDiffusionImg2ImgPipeline AltDiffusionPipeline AnyFlowFARPipeline AnyFlowPipeline "
            "AudioLDM2Pipeline AudioLDMPipeline MusicLDMPipeline "
            "BlipDiffusionControlNetPipeline BlipDiffusionPipeline BriaFibo2Pipeline BriaFiboEditPipeline "
            "BriaFiboPipeline ConsisIDPipeline DanceDiffusionPipeline DreamLiteMobilePipeline DreamLitePipeline "
            "EasyAnimateInpaintPipeline ErnieImagePipeline GlmImagePipeline HunyuanImageRefinerPipeline "
            "Ideogram4Pipeline JoyImageEditPipeline JoyImageEditPlusPipeline Kandinsky6SRPipeline Krea2Pipeline "
            "LongCatAudioDiTPipeline LongCatImageEditPipeline MotifVideoImage2VideoPipeline MotifVideoPipeline "
            "NucleusMoEImagePipeline QwenImage21Pipeline QwenImageLayeredPipeline SanaWMPipeline "
            "StableAudio3AudioToAudioPipeline StableAudio3InpaintPipeline StableAudio3Pipeline "
            "StableDiffusionGLIGENTextImagePipeline UniDiffuserPipeline VersatileDiffusionDualGuidedPipeline "
            "VersatileDiffusionImageVariationPipeline VersatileDiffusionPipeline "
            "VersatileDiffusionTextToImagePipeline VisualClozeGenerationPipeline VisualClozePipeline "
            "WanAnimatePipeline WuerstchenCombinedPipeline WuerstchenDecoderPipeline ZImageOmniPipeline"
        ).split(),
        _UNBUILT,
    ),
    **dict.fromkeys(
        (
            "Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline OmniGenPipeline QwenImageEditInpaintPipeline "
            "QwenImageEditPipeline QwenImageEditPlusPipeline"
        ).split(),
        _TORCHVISION,
    ),
    "AudioDiffusionPipeline": "needs librosa",
    "SpectrogramDiffusionPipeline": "needs note_seq",
    "ChromaInpaintPipeline": "diffusers asks its transformer for `guidance_embeds`, which that does not have",
    "EasyAnimateControlPipeline": "diffusers calls its `encode_prompt` with an argument that it does not take",
    "MarigoldIntrinsicsPipeline": "it returns two pictures a sample",
    **dict.fromkeys(
        ("UnCLIPImageVariationPipeline", "UnCLIPPipeline"),
        "several loops with a scheduler each, none of them the main one",
    ),
    "SemanticStableDiffusionPipeline with editing prompts": "its momentum carries predictions from step to step: the "
    "parity gate refuses it",
}


def uncovered() -> dict[str, str]:
    """Return the names of the uncovered classes by the reason."""
    return {
        why: ", ".join(name for name, reason in UNCOVERED.items() if reason == why) for why in UNCOVERED.values()
    }


def test_every_class_that_diffusers_exports_is_somewhere() -> None:
    """Measured, refused or named with a reason, and in one of these only."""
    covered = {class_of(name) for name in CASES}
    named = {name for name in UNCOVERED if " " not in name}
    assert not named & covered
    assert named | covered == set(exported())


def write_page() -> None:
    """Write the page: this run's rows over those that are there."""
    rows = {name: Row(*cells) for name, cells in committed().items()} | MEASURED
    PAGE.write_text(page({name: rows[name] for name in TRAINED if name in rows}), encoding="utf-8")


@functools.cache
def reason(name: str) -> str:
    try:
        Sampler(Policy(CASES[name].build(), LoraConfig(rank=2)), steps=4)
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def quirk_lines() -> dict[str, int]:
    """Return how many entries of the quirk table each family has."""
    counts: dict[str, int] = {}
    for key in QUIRKS:
        families = {case.family for name, case in CASES.items() if class_of(name).startswith(key)}
        for family in families or {key}:
            counts[family] = counts.get(family, 0) + 1
    return dict(sorted(counts.items()))


def committed() -> dict[str, list[str]]:
    """Return the rows of the committed page by class."""
    known = CASES.keys() - REFUSED.keys()
    rows: dict[str, list[str]] = {}
    if not PAGE.exists():
        return rows
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == len(COLUMNS) and cells[0] in known:
            rows[cells[0]] = cells[1:]
    return rows


def test_the_page_has_every_row_and_says_what_is_measured(tmp_path: Path) -> None:
    """Last in the file: writes the page when asked to, and otherwise holds it against this run."""
    if WRITING:
        write_page()
    rows = committed()
    assert list(rows) == list(TRAINED)
    assert len({class_of(name) for name in rows}) >= 30
    assert PAGE.read_text(encoding="utf-8") == page({name: Row(*cells) for name, cells in rows.items()})
    assert all(cells[1] == "0" for cells in rows.values())
    assert max(quirk_lines().values()) < 15


def test_a_row_would_notice_what_it_measures() -> None:
    """Planted faults: each measurement must fail on its own."""
    case = CASES["StableDiffusionPipeline"]
    sampler = Sampler(policy_of(case), steps=4, eta=0.7, batch_size=2, call=case.call)
    calls = Calls(sampler)
    trajectory = sampler.rollout(PROMPTS)
    recorded = calls.taken()
    assert recorded == [0, 1, 2, 3]
    sampler._tap._shapes.clear()  # a tap that has forgotten the shapes cannot skip
    with pytest.raises(AssertionError, match="replaying step"):
        measure_window(sampler, trajectory, calls, recorded)
    other = dataclasses.replace(trajectory, times=trajectory.times - 200)
    assert measure_probe(sampler, other) != "yes"
    backprop = sampler.backprop

    def scaled(*args: Any, grad_steps: Any = None, **kwargs: Any) -> torch.Tensor:
        images = backprop(*args, grad_steps=grad_steps, **kwargs)
        return images if grad_steps is not None else images + 0.5 * (images - images.detach())

    vars(sampler)["backprop"] = scaled
    assert measure_backprop(sampler, trajectory).startswith("off by")


# -- the pipeline of docs/custom_pipeline.md ---------------------------------------------------------------------


def test_the_custom_pipeline_of_the_docs_trains_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's blocks are run as they stand: fifty lines of pipeline, a run, and its file in a fresh object.

    On the same noise the tuned pipeline scores higher than the base by more than two standard errors of the
    difference of two independent samples, and the fresh object draws what the trained one draws.
    """
    blocks = re.findall(r"```python\n(.*?)```", (PAGE.parent / "custom_pipeline.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "custom_pipeline"}
    assert len(blocks) == 3 and blocks[0].count("\n") <= 55 and "difftune" not in blocks[0]
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "custom_pipeline.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.parity["max_ratio_error"] == 0
    assert trainer.parity["layers_reached"] == trainer.parity["layers"] == 3

    def draw(pipe: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(96)]
        prompts = ["two strokes", "a storm", "the sea"] * 32
        return pipe(prompts, num_inference_steps=8, guidance_scale=2.0, generator=generators).images

    tuned = draw(names["pipe"])
    torch.testing.assert_close(draw(names["fresh"]), tuned, atol=1e-5, rtol=0)
    with trainer.policy.reference():
        base = draw(names["pipe"])
    scores = [images[:, 2].mean((1, 2)) - images[:, 0].mean((1, 2)) for images in (base, tuned)]
    error = float(sum(score.var() / len(score) for score in scores) ** 0.5)
    assert float(scores[1].mean() - scores[0].mean()) > 2 * error
