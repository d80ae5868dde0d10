"""What every test starts from: one thread, and Ctrl-C as a terminal has it.

The tensors are tiny, and on one thread results do not depend on the machine's cores. A shell starts what it puts into
the background with SIGINT ignored, and everything that such a process starts ignores it too.
"""

from __future__ import annotations

import signal

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Take back what a run in the test before may have set."""
    torch.set_num_threads(1)
