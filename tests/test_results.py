"""The page of results says what the records beside it say, and the records are of recipes that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from difftune import results
from difftune.config import load_config

DOCS = Path(__file__).resolve().parent.parent / "docs"


def record(**changed: Any) -> dict[str, Any]:
    """A record of four pictures."""
    return {
        "recipe": "ddpo-compressibility-tiny-sd",
        "seed": 0,
        "settings": {"algorithm": {"name": "ddpo"}},
        "before": {"reward/mean": 1.0, "reward/std": 0.3},
        "after": {"reward/mean": 2.0, "reward/std": 0.4},
        "pictures": 4,
        "denoiser_rows": 1000,
        "seconds": 60.0,
        **changed,
    }


def test_the_gain_is_in_standard_errors_of_the_difference() -> None:
    assert results.gain(record()) == pytest.approx(1 / (0.5 / 2))
    assert results.gain(record(pictures=16)) == pytest.approx(8.0)
    flat = {"reward/mean": 1.0, "reward/std": 0.0}
    assert results.gain(record(before=flat, after={**flat, "reward/mean": 0.5})) == -float("inf")


def test_the_page_has_a_line_for_each_recipe_over_its_seeds() -> None:
    other = record(seed=1, after={"reward/mean": 3.0, "reward/std": 0.4})
    text = results.page([record(), other], threads=1)
    (line,) = (line for line in text.splitlines() if "ddpo-compressibility" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["2", "1.000", "2.500", "+4.0, +8.0", "1,000", "60"]


def test_the_cells_are_the_embedded_recipes_with_their_seeds() -> None:
    cells = list(results.cells(["ddpo-*"]))
    assert [seed for name, seed in cells if name == "ddpo-compressibility-tiny-sd"] == [0, 1, 2]
    assert [seed for name, seed in cells if name == "ddpo-scene-tiny-sd"] == [0]
    assert all(load_config(name).model.id.startswith("difftune/tiny-") for name, _ in cells)


def test_settings_name_no_place_and_tell_seeds_apart() -> None:
    one, other = (results.settings_of("ddpo-scene-tiny-sd", seed, 1) for seed in (0, 1))
    assert one != other and "out" not in one and "device" not in one
    assert json.loads(json.dumps(one)) == one, "records are read back from JSON and compared"


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """The records that are kept."""
    found = results.read_records(DOCS / "results")
    if not found:
        assert not (DOCS / "results.md").exists(), "a page without records"
        pytest.skip("no records are kept: run make results")
    return found


def test_the_page_is_what_the_records_say(records: list[dict[str, Any]]) -> None:
    assert (DOCS / "results.md").read_text() == results.page(records, threads=1)


def test_every_record_is_of_its_recipe_as_it_stands(records: list[dict[str, Any]]) -> None:
    for one in records:
        assert results.up_to_date(one, 1), one["recipe"]


def test_a_record_is_stale_when_its_recipe_changes_and_not_when_a_setting_is_born() -> None:
    recorded = {"lr": 1, "train": {"epochs": 2}}
    assert results.unchanged(recorded, {"lr": 1, "train": {"epochs": 2, "new": 0}, "newer": {}}, {"lr": 1})
    assert not results.unchanged(recorded, {"lr": 1, "train": {"epochs": 3}}, {})
    assert not results.unchanged(recorded, {"lr": 1, "train": {"epochs": 2, "new": 5}}, {"train": {"new": 5}})


def test_the_same_records_give_the_same_curves(tmp_path: Path) -> None:
    both = [record(seed=seed, rewards=[0.1 * seed, 0.5, 0.7]) for seed in (0, 1)]
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        results.curves(both, tmp_path / name / "ddpo.svg")
    drawn = (tmp_path / "one" / "ddpo.svg").read_text()
    assert drawn == (tmp_path / "other" / "ddpo.svg").read_text()
    assert "seed 1" in drawn and "ddpo-compressibility-tiny-sd" in drawn


def test_every_algorithm_learns_by_its_recipe(records: list[dict[str, Any]]) -> None:
    """Two standard errors, with every seed, is what counts as learning."""
    for one in records:
        assert results.gain(one) >= 2, f"{one['recipe']}, seed {one['seed']}"
