"""Every public symbol has a docstring, and no tracked text names a machine's path or a registry's host."""

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["difftune", "algorithms", "rewards", "configs"]


def python_files() -> list[Path]:
    """Return every Python file of the package, each once (links are not followed)."""
    return sorted(
        Path(parent, file)
        for folder in FOLDERS
        for parent, _, files in os.walk(ROOT / folder, followlinks=False)
        for file in files
        if file.endswith(".py")
    )


def undocumented(tree: ast.Module, name: str) -> Iterator[str]:
    """Yield the public module, classes, functions and methods of ``tree`` without a docstring, as ``name:line``.

    Public is what no leading underscore hides, on the way down too. Property setters and overloads are documented
    where the property and the function are.
    """
    if not ast.get_docstring(tree):
        yield f"{name}:1 module"
    yield from _undocumented_in(tree.body, name, "")


def _undocumented_in(body: list[ast.stmt], name: str, prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            yield from _undocumented_in(inner, name, prefix)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
        if not ast.get_docstring(node) and not decorators & {"setter", "deleter", "overload"}:
            yield f"{name}:{node.lineno} {prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented_in(node.body, name, f"{prefix}{node.name}.")


def test_every_public_symbol_has_a_docstring() -> None:
    files = python_files()
    assert len(files) > 5
    missing = [
        where
        for path in files
        for where in undocumented(ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    ]
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_planted_gaps_are_found() -> None:
    source = '''
class Documented:
    """Yes."""
    def gap(self): ...
    def _private(self): ...
    @property
    def size(self):
        """Size."""
    @size.setter
    def size(self, value): ...
    class Config: ...
class _Hidden:
    def inside(self): ...
@overload
def typed(x: int) -> int: ...
def typed(x):
    """Yes."""
    def local(): ...
if True:
    async def late(): ...
'''
    found = list(undocumented(ast.parse(source), "m.py"))
    assert [where.split()[1] for where in found] == ["module", "Documented.gap", "Documented.Config", "late"]


# Built from pieces, so that this file does not name what it forbids.
_FOLDERS = "|".join(["ro" + "ot", "ho" + "me", "wo" + "rk", "o" + "pt", "Us" + "ers"])
_HOSTS = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", r"npm" + r"js\.(org|com)", "deb" + r"ian\.org"])
FORBIDDEN = {
    "an absolute path of one machine": re.compile(rf"(?<![\w.~*}}>)-])/({_FOLDERS})/"),
    "the host of a package registry": re.compile(rf"\b({_HOSTS})\b"),
}


def forbidden_in(text: str) -> Iterator[str]:
    """Yield ``line: what`` for each forbidden word of ``text``."""
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            match = pattern.search(line)
            if match:
                yield f"{number}: {what}, {match.group()!r}"


def tracked_files() -> list[Path]:
    """Return the files git tracks, without links and without those deleted in the working tree."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_tracked_text_names_a_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [f"{path.relative_to(ROOT)}:{where}" for where in forbidden_in(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "see " + "/".join(["", "root", "x"]),
        "'" + "/".join(["", "home", "ann", "x"]) + "'",
        "file://" + "/".join(["", "work", "main"]),
        "cd=" + "/".join(["", "opt", "wheels"]),
        "https://" + "pypi" + ".org/simple",
        "https://files." + "python" + "hosted.org/x",
    ],
)
def test_planted_word_is_found(text: str) -> None:
    assert len(list(forbidden_in("first\n" + text))) == 1


@pytest.mark.parametrize("text", ["/".join(["a", "wo" + "rk", "b"]), "pip install difftune", "example.com/home/x"])
def test_harmless_text_passes(text: str) -> None:
    assert list(forbidden_in(text)) == []
