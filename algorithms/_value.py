"""A value function of unfinished samples: what is left of a reward once its prompt's mean is taken off."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from difftune.types import SampleKey

#: Bins that a latent of any shape is averaged into, hashed words of a prompt, and waves of the noise level.
BINS, WORDS, WAVES = 64, 64, 8


def features(x: Tensor, level: float, prompts: Sequence[str]) -> Tensor:
    """Return ``(B, F)`` fp32 features, on the CPU, of noisy samples ``(B, *latent)`` at a noise level in [0, 1].

    Latents are averaged over runs of neighbours, so that any shape and size gives as many numbers; words are counted by
    hash; the level becomes sines and cosines.
    """
    pooled = F.adaptive_avg_pool1d(x.detach().float().flatten(1).unsqueeze(1), BINS).squeeze(1).cpu()
    words = torch.zeros(len(prompts), WORDS)
    for row, prompt in enumerate(prompts):
        for word in prompt.lower().split():
            words[row, zlib.crc32(word.encode()) % WORDS] += 1
    angles = level * math.pi * 2.0 ** torch.arange(WAVES // 2)
    waves = torch.cat([angles.sin(), angles.cos()]).expand(len(prompts), -1)
    return torch.cat([pooled, words, waves], 1)


class ValueNet:
    """A small network fitted by mean squared error to what it is shown; 0 before the first fit.

    What was shown since the last fit is brought together from all processes and put in order, so that neither the
    micro-batches nor the processes that it was shown in make a difference.

    Args:
        lr: learning rate of Adam.
        buffer: rows remembered, the newest.
    """

    def __init__(self, lr: float, buffer: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._net = nn.Sequential(
                nn.Linear(BINS + WORDS + WAVES, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)
            )
        last: Any = self._net[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr)
        self._buffer = buffer
        self._rows = torch.zeros(0, BINS + WORDS + WAVES)
        self._targets = torch.zeros(0)
        self._shown: list[tuple[str, int, int, Tensor, float]] = []
        self._fits = 0

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Return the values ``(B,)`` of features ``(B, F)``."""
        return self._net(rows).squeeze(1)

    def show(self, keys: Sequence[SampleKey], step: int, rows: Tensor, targets: Tensor) -> None:
        """Take down the samples' features ``(B, F)`` at a step, and what they led to ``(B,)``, for the next fit."""
        for key, row, target in zip(keys, rows, targets.tolist(), strict=True):
            self._shown.append((key.prompt, key.sample, step, row, target))

    def fit(self, steps: int, batch: int) -> None:
        """Take ``steps`` optimizer steps on ``batch`` rows each, drawn by the number of fits so far.

        Every process must come here.
        """
        # By sample and step: what was shown in several passes over a rollout was the same in each.
        shown = {tuple(place): (row, target) for *place, row, target in gather_object(self._shown)}
        self._shown = []
        if shown:
            rows, targets = zip(*(shown[place] for place in sorted(shown)), strict=True)
            self._rows = torch.cat([self._rows, torch.stack(rows)])[-self._buffer :]
            self._targets = torch.cat([self._targets, torch.tensor(targets)])[-self._buffer :]
        generator = torch.Generator().manual_seed(self._fits)
        self._fits += 1
        for _ in range(steps if len(self._rows) else 0):
            chosen = torch.randint(len(self._rows), (batch,), generator=generator)
            with torch.enable_grad():
                loss = F.mse_loss(self._net(self._rows[chosen]).squeeze(1), self._targets[chosen])
                self._optimizer.zero_grad()
                loss.backward()
            self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of weights, optimizer and what is remembered."""
        state = {
            "net": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rows": self._rows,
            "targets": self._targets,
            # Empty in a checkpoint, which is written after a fit.
            "shown": self._shown,
            "fits": self._fits,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rows, self._targets, self._fits = state["rows"], state["targets"], state["fits"]
        self._shown = list(state.get("shown", []))
