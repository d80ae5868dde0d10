"""One thread for every test: the tensors are tiny, and results then do not depend on the machine's cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
