"""Imports point downwards, and the command line and the facade import no torch.

The order of the package is data here (``ORDER``): a new module takes its place in it or these tests fail.
"""

import ast
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import difftune as dt

ROOT = Path(__file__).resolve().parent.parent

# Upper lines may import lower ones. Modules on one line are peers and do not import each other.
# A folder (zoo) is one entry: its modules may import each other. The longest entry that fits a module counts.
ORDER: list[list[str]] = [
    ["bench", "performance", "results", "zoo.build", "__main__"],  # commands of their own, run with python -m
    ["cli"],
    ["doctor"],  # looks at a configuration before a run
    ["config"],
    ["trainer"],
    ["algorithms", "rewards"],  # plug-ins: see PLUGINS
    ["checkpoint", "export", "labelled", "monitor", "processes", "report", "serve", "tracking"],
    ["sampler"],
    ["drivers"],
    ["puppet", "denoiser", "prompt_cache", "quirks"],
    ["policy"],
    ["algorithm", "reward"],
    ["advantage", "memory", "noise"],
    ["transition"],
    ["preferences"],
    ["prompts", "window"],
    ["types"],
    ["registry"],
    ["zoo"],
]
RANK = {name: len(ORDER) - line for line, names in enumerate(ORDER) for name in names}

# One file per plug-in, and none imports another, of its own folder or not. What several share goes into a module
# whose name starts with an underscore (the registry does not take it for a plug-in), or down into the spine.
PLUGINS = {"algorithms", "rewards"}

FOLDERS = {"difftune": "difftune", "algorithms": "difftune.algorithms", "rewards": "difftune.rewards"}


def package_modules() -> dict[str, Path]:
    """Return dotted name -> file of every module of the package, each once (links are not followed)."""
    found = {}
    for folder, package in FOLDERS.items():
        for parent, _, files in os.walk(ROOT / folder, followlinks=False):
            for file in files:
                if file.endswith(".py"):
                    path = Path(parent, file)
                    parts = path.relative_to(ROOT / folder).with_suffix("").parts
                    parts = parts[:-1] if parts[-1] == "__init__" else parts
                    found[".".join((package, *parts))] = path
    return found


def entry_of(module: str) -> str | None:
    """Return the entry of ``ORDER`` that ``module`` belongs to: the longest that fits, ``None`` if none does."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def is_type_checking(node: ast.stmt) -> bool:
    """Say whether ``node`` is ``if TYPE_CHECKING:``, with or without ``typing.``."""
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")) == "TYPE_CHECKING"


def import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports anywhere in ``tree``, lazy ones inside functions too, those for type checkers not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and is_type_checking(node):
            for other in node.orelse:
                yield from import_statements(ast.Module([other], []))
        else:
            yield from import_statements(node)


def imported_modules(module: str, source: str, modules: set[str], is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of the package's modules that ``source`` imports.

    ``from difftune.x import y`` is ``difftune.x.y`` where that is a module and ``difftune.x`` otherwise.
    """
    for node in import_statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                home = module.split(".")
                home = home[: len(home) - node.level + is_package]
                base = ".".join([*home, base] if base else home)
            full = [f"{base}.{alias.name}" for alias in node.names]
            # The version is the one name that everything may take from the facade.
            targets = [name if name in modules else base for name in full if name != "difftune.__version__"]
        for target in targets:
            if target == "difftune" or target.startswith("difftune."):
                yield node.lineno, target


def violations(module: str, source: str, modules: set[str], is_package: bool = False) -> list[str]:
    """Return what is wrong with the imports of ``module``, one sentence each."""
    entry = entry_of(module)
    if entry is None:
        return [f"{module} has no place in ORDER (tests/test_imports.py): put it on a line"]
    found = []
    for line, target in imported_modules(module, source, modules, is_package):
        lower = entry_of(target)
        where = f"{module}:{line} imports {target}"
        if target == "difftune":
            if RANK[entry] < RANK["cli"]:
                found.append(f"{where}: the facade is above everything, import the name from its own module")
        elif lower is None:
            found.append(f"{where}, which has no place in ORDER (tests/test_imports.py)")
        elif entry == lower:
            another = target.split(".")[2:] and not target.split(".")[2].startswith("_")
            if entry in PLUGINS and module != target and another:
                found.append(f"{where}: a plug-in imports no other plug-in")
        elif RANK[entry] == RANK[lower]:
            found.append(f"{where}: {entry} and {lower} are on one line and do not import each other")
        elif RANK[entry] < RANK[lower]:
            found.append(f"{where}: an upward edge, {lower} is above {entry}")
    return found


def test_imports_point_downwards() -> None:
    files = package_modules()
    assert len(files) > 5
    found = [
        problem
        for module, path in sorted(files.items())
        if module != "difftune"  # the facade, lazy by construction
        for problem in violations(module, path.read_text(), set(files), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


MODULES = {f"difftune.{name}" for name in RANK} | {
    "difftune",
    "difftune.algorithms.ddpo",
    "difftune.algorithms.grpo",
    "difftune.rewards.scene",
    "difftune.rewards._clip",
    "difftune.zoo.world",
}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("difftune.policy", "import difftune.trainer", "upward edge"),
        ("difftune.policy", "from difftune import sampler", "upward edge"),
        ("difftune.policy", "from .trainer import Trainer", "upward edge"),
        ("difftune.policy", "from . import trainer", "upward edge"),
        ("difftune.types", "def late():\n    from difftune.config import load", "upward edge"),
        ("difftune.registry", "try:\n    import difftune.types\nexcept ImportError:\n    pass", "upward edge"),
        ("difftune.reward", "from difftune.algorithm import x", "on one line"),
        ("difftune.zoo", "from difftune.zoo.build import main", "upward edge"),
        ("difftune.zoo.world", "from ..types import UserError", "upward edge"),
        ("difftune.algorithms.ddpo", "from difftune.trainer import Trainer", "upward edge"),
        ("difftune.algorithms.ddpo", "import difftune.algorithms.grpo", "no other plug-in"),
        ("difftune.algorithms.ddpo", "from difftune.algorithms import grpo", "no other plug-in"),
        ("difftune.algorithms.ddpo", "from .grpo import loss", "no other plug-in"),
        ("difftune.algorithms.ddpo", "from difftune.rewards.scene import score", "on one line"),
        ("difftune.rewards.scene", "import difftune as dt", "facade"),
        ("difftune.rewards.scene", "from difftune import reward_typo", "facade"),
        ("difftune.policy", "import difftune.helpers", "no place in ORDER"),
        ("difftune.helpers", "import os", "no place in ORDER"),
        ("difftune.types", "if TYPE_CHECKING:\n    pass\nelse:\n    import difftune.cli", "upward edge"),
    ],
)
def test_planted_violation_is_found(module: str, source: str, expected: str) -> None:
    found = violations(module, source, MODULES, is_package=module == "difftune.zoo")
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("difftune.trainer", "from difftune.sampler import Sampler\nimport torch"),
        ("difftune.policy", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import difftune.trainer"),
        ("difftune.policy", "import typing\nif typing.TYPE_CHECKING:\n    import difftune.trainer"),
        ("difftune.checkpoint", "from difftune import __version__"),
        ("difftune.rewards.scene", "from difftune.reward import reward\nfrom difftune.zoo import world"),
        ("difftune.rewards.scene", "from difftune.rewards._clip import load"),
        ("difftune.zoo.build", "from difftune.zoo import world\nfrom difftune.rewards.scene import score"),
        ("difftune.bench", "import difftune as dt"),
        ("difftune.policy", "import difftuneful"),
    ],
)
def test_downward_import_passes(module: str, source: str) -> None:
    assert violations(module, source, MODULES) == []


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter whose first import path is ``cwd``."""
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


LIBRARIES = {"torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "scipy"}
HEAVY = f"heavy = {LIBRARIES} & set(sys.modules)\nassert not heavy, heavy"


def test_facade_imports_no_torch() -> None:
    code = f"import sys, difftune; dir(difftune); difftune.__version__; {HEAVY}"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("difftune.cli") is None, reason="difftune.cli does not exist yet")
def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom difftune.cli import main\nsys.argv = ['difftune', '--help']\n"
        f"try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n{HEAVY}"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_facade_names_agree() -> None:
    """The lazy table, what type checkers see and ``__all__`` are the same names from the same modules."""
    tree = ast.parse((ROOT / "difftune" / "__init__.py").read_text())
    checked = {
        alias.name: node.module
        for block in tree.body
        if is_type_checking(block)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"difftune.{home}" for name, home in dt._HOME.items()}
    assert checked == {**lazy, "reward": "difftune.reward"}
    assert sorted(dt.__all__) == sorted([*checked, "__version__"])
    assert set(dt.__all__) <= set(dir(dt))


@pytest.mark.parametrize("name", sorted(dt._HOME))
def test_facade_name_resolves(name: str) -> None:
    home = f"difftune.{dt._HOME[name]}"
    if importlib.util.find_spec(home) is None:
        pytest.skip(f"{home} does not exist yet")
    assert getattr(dt, name) is getattr(importlib.import_module(home), name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'difftune' has no attribute 'Polcy'"):
        dt.Polcy  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "import difftune",
        "import difftune; difftune.reward",
        "import difftune.reward",
        "from difftune.reward import build_reward",
        "from difftune import reward",
        "import difftune.other",
    ],
)
def test_reward_is_the_decorator_in_any_import_order(first: str, tmp_path: Path) -> None:
    """On a copy of the facade beside a stand-in ``reward.py``, so that it runs without torch."""
    package = tmp_path / "difftune"
    package.mkdir()
    shutil.copy(ROOT / "difftune" / "__init__.py", package)
    (package / "reward.py").write_text("def reward(name): return name\ndef build_reward(): return 'built'\n")
    (package / "other.py").write_text("import difftune.reward\nfrom difftune.reward import reward\n")
    code = (
        f"import warnings; warnings.simplefilter('error')\n{first}\n"
        "import sys, difftune as dt, difftune.reward\n"
        "from difftune import reward\n"
        "from difftune.reward import build_reward\n"
        "assert dt.reward('x') == 'x' and dt.reward is reward\n"
        "assert dt.build_reward is build_reward and build_reward() == 'built'\n"
        "assert sys.modules['difftune.reward'].reward is dt.reward\n"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_real_reward_is_the_decorator() -> None:
    module = importlib.import_module("difftune.reward")
    assert dt.reward is module.reward
    assert callable(dt.reward)
