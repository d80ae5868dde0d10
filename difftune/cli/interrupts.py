"""SIGINT and SIGTERM: a run stops at its next boundary, or at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _leave_on_second(reading: int) -> None:
    """Read the numbers of the signals that arrive, until the pipe is closed; the second one ends the process."""
    count = 0
    with open(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            count += number[0] in _SIGNALS
            if count == 2:
                os._exit(130)


class Interrupts:
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

    def __enter__(self) -> Interrupts:
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
