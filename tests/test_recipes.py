"""The recipes: each validates, says where its values come from, and the embedded ones run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from difftune import cli
from difftune import config as cf

NAMES = sorted(cf.recipes())
EMBEDDED = [name for name in NAMES if "tiny" in name or name == "demo"]
REAL = [name for name in NAMES if name not in EMBEDDED]
ROOT = Path(__file__).parent.parent


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
            assert re.search(r"# .*\[(own|ddpo|flow)\]", line), line
    assert "not run this recipe at this size" in cf.recipe_text(name).replace("\n# ", " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_recipe_passes_its_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = ["train.sample_count=4", "sampler.batch_size=4", "train.micro_batch=4"]
    assert cli.main(["check", name, *smaller]) == 0
    out = capsys.readouterr().out
    assert "parity: |ratio - 1| at most 0 over" in out
    assert re.search(r"forecast: \d+ ", out)
