"""The recipes: each validates, says where its values come from, and the embedded ones run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
from pipelines.flux import flux
from pipelines.sdxl import sdxl

from difftune import cli
from difftune import config as cf
from difftune.algorithm import ALGORITHMS, Plan
from difftune.reward import REWARDS, FunctionReward, WeightedReward

NAMES = sorted(cf.recipes())
EMBEDDED = [name for name in NAMES if "tiny" in name or name == "demo"]
REAL = [name for name in NAMES if name not in EMBEDDED]
BUILT_IN = [name for name in ALGORITHMS if ALGORITHMS.origin(name).startswith("difftune.algorithms.")]
ROOT = Path(__file__).parent.parent

#: Whose a value is: ours, or that of a paper or its authors' code. A recipe says at its top what its tags stand for.
TAGS = set(
    "own ddpo dpok flow dance mixgrpo cps guard alignprop draft refl drtune adjoint "
    "d3po dpo kto seppo prdp rwr raft videoalign nft awm".split()
)


def test_the_recipes_are_the_files_of_the_folder() -> None:
    assert NAMES == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert {"demo", "ddpo-scene-tiny-sd", "ddpo-scene-tiny-flow"} <= set(EMBEDDED) and len(REAL) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_validates_and_reloads_to_its_equal(name: str) -> None:
    config = cf.load_config(name)
    assert config.out == f"runs/{name}"
    assert cf.validate(cf.parse_yaml(cf.to_yaml(cf.resolve(config)), name)) == config
    text = cf.recipe_text(name)
    assert re.match(r"# [A-Z].{20,115}\n#\n# ", text), "a first line for the list, then an empty one, then more"
    assert cf.recipes()[name] == text.splitlines()[0][2:]


@pytest.mark.parametrize("name", REAL)
def test_every_value_for_a_real_model_quotes_its_source(name: str) -> None:
    """Each line that sets a hyper-parameter ends in a comment that says whose it is, ours included."""
    sections = ("lora", "sampler", "algorithm", "train", "evaluate", "gradient_checkpointing")
    section = ""
    for line in cf.recipe_text(name).splitlines():
        top = re.match(r"(\w+):", line)
        section = top.group(1) if top else section
        if section in sections and re.match(r"\s*\w+: \S", line) and not re.match(r"\s+name: ", line):
            assert re.search(r"# .*\[\w+\]", line), line
    text = cf.recipe_text(name).replace("\n# ", " ")
    assert "not run this recipe at this size" in text
    head, body = text.split("\nmodel:")
    used = set(re.findall(r"\[([a-z]\w*)\]", " ".join(re.findall(r"#.*", body))))
    assert used <= TAGS
    assert used <= set(re.findall(r"\[(\w+)\]", head)), "the top of the recipe says what its tags stand for"


def test_every_algorithm_has_a_recipe_for_a_real_model() -> None:
    found = {cf.parse_yaml(cf.recipe_text(name), name)["algorithm"]["name"] for name in REAL}
    assert found == set(BUILT_IN)


def test_every_tag_has_a_recipe() -> None:
    """A tag that no recipe uses is a paper that is not quoted."""
    assert all(any(f"[{tag}]" in cf.recipe_text(name) for name in REAL) for tag in TAGS)


STAND_INS: dict[str, Callable[[], Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny.sd_pipeline,
    "stabilityai/stable-diffusion-xl-base-1.0": lambda: sdxl("StableDiffusionXLPipeline"),
    "stabilityai/stable-diffusion-3.5-medium": tiny.sd3_pipeline,
    "black-forest-labs/FLUX.1-dev": lambda: flux("FluxPipeline", guided=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_recipes_parts_fit_its_models_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampler and algorithm are built around a pipeline of the same class, with few random weights."""

    def load(model: str, scheduler: str | None = None, **settings: Any) -> Any:
        pipe = STAND_INS[model]()
        if scheduler is not None:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        return pipe

    config = cf.load_config(name, ["device=cpu"])
    kinds = config.reward if isinstance(config.reward, list) else [config.reward]
    names = [kind if isinstance(kind, str) else kind["name"] for kind in kinds]
    differentiable = all(getattr(REWARDS.get(kind), "differentiable", False) for kind in names)
    stand_in = FunctionReward("stand_in", lambda images, prompts: images.flatten(1).mean(1), differentiable)
    # A list is a sum of its terms, which some algorithms standardise apart.
    summed = isinstance(config.reward, list)
    scorer = WeightedReward([(kind, 1.0, stand_in) for kind in names]) if summed else stand_in
    monkeypatch.setattr("difftune.config.objects.load_pipeline", load)
    monkeypatch.setattr("difftune.config.objects.load_reward", lambda spec: scorer)
    run = cf.build(config)
    train = config.train
    plan = Plan(train.prompts_per_epoch, train.samples_per_prompt, train.updates_per_epoch)
    run.algorithm.check(run.sampler, scorer, plan)
    assert config.sampler.dynamics in ("auto", run.sampler.dynamics)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_recipe_passes_its_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = ["train.sample_count=4", "sampler.batch_size=4", "train.micro_batch=4"]
    assert cli.main(["check", name, *smaller]) == 0
    out = capsys.readouterr().out
    # What trains on pictures alone, or through the chain, has no ratio.
    has_ratio = ALGORITHMS.get(cf.load_config(name).algorithm["name"]).evidence == "transitions"
    assert ("parity: |ratio - 1| at most 0 over" in out) == has_ratio
    assert re.search(r"forecast: \d+ ", out)
