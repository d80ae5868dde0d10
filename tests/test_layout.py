"""The layout: the links resolve, the mapping is complete, and the built wheel works outside the checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import difftune as dt

ROOT = Path(__file__).resolve().parent.parent
LINKED = ["algorithms", "rewards", "configs"]
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache", ".ipynb_checkpoints"}


def setup_section(section: str) -> dict[str, str]:
    """Return one section of ``setup.cfg``."""
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "setup.cfg")
    return dict(parser[section])


def files_below(folder: Path) -> list[Path]:
    """Return the files of ``folder``, links not followed and caches left out, relative to it."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if name not in CACHES]
        found += [Path(parent, name).relative_to(folder) for name in files if not name.endswith(".pyc")]
    return sorted(found)


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_resolves(name: str) -> None:
    link = ROOT / "difftune" / name
    assert link.is_symlink(), f"{name}: not a link (git's core.symlinks may be off)"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name / "__init__.py").is_file()


def test_links_are_the_mapping() -> None:
    mapping = dict(line.split(" = ") for line in setup_section("options")["package_dir"].strip().splitlines())
    assert mapping == {f"difftune.{name}": name for name in LINKED}
    assert {path.name for path in (ROOT / "difftune").iterdir() if path.is_symlink()} == set(LINKED)


def test_every_package_is_listed() -> None:
    """A new folder with an ``__init__.py`` that is missing from setup.cfg would be missing from the wheel."""
    folders = {"difftune": "difftune", **{name: f"difftune.{name}" for name in LINKED}}
    found = {
        ".".join((package, *path.parent.parts))
        for folder, package in folders.items()
        for path in files_below(ROOT / folder)
        if path.name == "__init__.py"
    }
    assert found == set(setup_section("options")["packages"].split())


def test_one_version() -> None:
    assert setup_section("metadata")["version"] == "attr: difftune.__version__"
    assert f"\nversion: {dt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_extra_pulls_torchvision() -> None:
    """These packages require torchvision; unpinned, it replaces the installed torch by another build."""
    banned = {"torchvision", "open_clip_torch", "open-clip-torch", "hpsv2", "image-reward", "easyocr", "timm", "lpips"}
    wanted = [*setup_section("options.extras_require").values(), setup_section("options")["install_requires"]]
    names = {re.split(r"[<>=!~\[; ]", line.strip())[0].lower() for block in wanted for line in block.splitlines()}
    assert "torch" in names
    assert not names & banned


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tracked and new files, unpack it outside the checkout and return where."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_checkout(source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"difftune-{dt.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def copy_checkout(target: Path) -> None:
    """Copy what a build reads, links as links, so that the build leaves nothing in the checkout."""
    target.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("difftune", *LINKED):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns(*CACHES, "*.pyc"))


@pytest.mark.slow
def test_wheel_holds_every_file(unpacked_wheel: Path) -> None:
    expected = {Path("difftune", path) for path in files_below(ROOT / "difftune")}
    for name in LINKED:
        expected |= {Path("difftune", name, path) for path in files_below(ROOT / name)}
    found = {Path("difftune", path) for path in files_below(unpacked_wheel / "difftune")}
    assert sorted(map(str, expected - found)) == []
    assert sorted(map(str, found - expected)) == []
    for path in sorted(expected):
        inside = path.relative_to("difftune")
        original = ROOT / inside if inside.parts[0] in LINKED else ROOT / path
        assert (unpacked_wheel / path).read_bytes() == original.read_bytes(), path


@pytest.mark.slow
def test_wheel_holds_nothing_else(unpacked_wheel: Path) -> None:
    """Top-level ``algorithms`` and ``rewards`` would be second copies, and would take those names for everyone."""
    assert sorted(path.name for path in unpacked_wheel.iterdir()) == [
        "difftune",
        f"difftune-{dt.__version__}.dist-info",
    ]


@pytest.mark.slow
def test_wheel_imports_outside_the_checkout(unpacked_wheel: Path, tmp_path: Path) -> None:
    modules = [
        f"difftune.{name}.{path.stem}"
        for name in ("algorithms", "rewards")
        for path in files_below(ROOT / name)
        if path.suffix == ".py" and path.name != "__init__.py" and len(path.parts) == 1
    ]
    recipes = [str(path) for path in files_below(ROOT / "configs") if path.suffix == ".yaml"]
    code = f"""
import importlib, importlib.resources, sys
sys.path[:] = [path for path in sys.path if {str(ROOT)!r} != path]
# An editable install of the checkout must not answer for the wheel.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path.insert(0, {str(unpacked_wheel)!r})
for name in ["difftune", "difftune.configs", *{modules!r}]:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(unpacked_wheel)!r}), module.__file__
for recipe in {recipes!r}:
    assert importlib.resources.files("difftune.configs").joinpath(recipe).read_text().strip(), recipe
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
