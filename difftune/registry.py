"""Names to builders: the one place where algorithms and rewards are looked up.

A :class:`Registry` fills itself from three sources, in this order: the package that ships with difftune (one module per
entry, imported on first use), the entry-point group of installed packages, and plug-in files named by the user. A
name means one thing only: registering it twice is an error, and an unknown name is answered with the nearest one.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class RegistryError(ValueError):
    """A name that cannot be registered or found; the message says what was got, what is expected and what to do."""


def nearest(name: str, known: list[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest of ``known``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Entries of one kind (``"algorithm"``, ``"reward"``) by name.

    Args:
        kind: the word used in messages.
        package: dotted name of the package whose modules register the built-in entries on import.
        entry_points: entry-point group that installed packages use, e.g. ``difftune.rewards``.
    """

    def __init__(self, kind: str, package: str, entry_points: str) -> None:
        self.kind = kind
        self._package = package
        self._group = entry_points
        self._entries: dict[str, T] = {}
        self._origin: dict[str, str] = {}
        self._broken: list[str] = []
        self._loaded = False

    def add(self, name: str, entry: T, origin: str) -> None:
        """Register ``entry`` under ``name`` (lower case, digits and underscores); a second origin is an error.

        ``origin`` is where the entry was defined (module and qualified name). The same origin may register again,
        as a notebook cell does when it is run twice; anything else is refused.
        """
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"{self.kind} name {name!r} is not usable: expected lower-case letters, digits and underscores, "
                f"starting with a letter, e.g. {re.sub(r'[^a-z0-9_]+', '_', name.lower()).strip('_') or 'my_name'!r}"
            )
        if name in self._entries and self._origin[name] != origin:
            raise RegistryError(
                f"{self.kind} {name!r} is already registered by {self._origin[name]}; {origin} must choose another name"
            )
        self._entries[name] = entry
        self._origin[name] = origin

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            RegistryError: there is none; the message says the nearest name, and which packages could not be asked.
        """
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            hint = nearest(name, sorted(self._entries))
            broken = f"; not loaded: {', '.join(self._broken)}" if self._broken else ""
            raise RegistryError(
                f"unknown {self.kind} {name!r}{hint} (known: {', '.join(sorted(self._entries))}{broken})"
            ) from None

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def origin(self, name: str) -> str:
        """Return where ``name`` was defined, as ``module.qualname``."""
        self.get(name)
        return self._origin[name]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
        for point in importlib.metadata.entry_points(group=self._group):
            # Importing the module is what registers: an entry point may name the module or the decorated object.
            try:
                point.load()
            except Exception as error:  # whatever another's package raises, it must not take the rest down
                self._leave_out(point, error)

    def _leave_out(self, point: importlib.metadata.EntryPoint, error: Exception) -> None:
        """Warn in one line that a package's entries are not there."""
        package = point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
        if package not in self._broken:
            self._broken.append(package)
        reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
        warnings.warn(
            f"the {self.kind} {point.name!r} of the installed package {package} cannot be loaded "
            f"({type(error).__name__}: {reason}) and is left out; mend or uninstall the package",
            stacklevel=2,
        )


def load_plugin(path: str | Path) -> str:
    """Import a user's plug-in file so that its decorators register, and return the module's name.

    The file runs once per process, however often it is named. Only paths that the user's own configuration or
    command line names may come here: a plug-in is code.

    Raises:
        FileNotFoundError: there is no such file.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"plug-in file {str(path)!r} does not exist (looked at {file})")
    name = f"difftune_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return name
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"plug-in {str(path)!r} is not a Python file (expected a name ending in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return name
