"""Windows that move: which steps of an epoch carry noise, where it is not the same ones all the time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difftune.types import UserError


class Window(BaseModel):
    """A window of ``size`` steps that is drawn or moved from epoch to epoch; the steps outside are ODE steps.

    ``random``: ``size`` neighbouring steps from a random one on, drawn anew every ``every`` epochs (Flow-GRPO-Fast:
    within the first half of the steps, which ``last`` says).
    ``sliding``: ``size`` neighbouring steps, from the noisiest on, that move by ``stride`` every ``every`` epochs and
    begin again when they have come to the end (MixGRPO, Li et al. 2025, arXiv 2507.21802: size 4 of 25 steps, stride 1,
    every 25).

    The steps are a function of (seed, epoch) alone, so a resumed run needs no state and all processes agree.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["random", "sliding"] = Field(description="A block of steps drawn at random, or one that moves.")
    size: int = Field(4, ge=1, description="Steps that carry noise in one epoch (MixGRPO: 4 of 25).")
    stride: int = Field(1, ge=1, description="Steps by which a sliding window moves.")
    every: int = Field(1, ge=1, description="Epochs between two moves or draws (MixGRPO: 25).")
    first: int = Field(0, ge=0, description="The first step that the window may hold.")
    last: int | None = Field(
        None, ge=0, description="The last step that it may hold; null: the last but one, since noise in the last one "
        "stays in the picture or does not exist."
    )  # fmt: skip

    def check(self, steps: int) -> None:
        """Refuse a window that does not fit into ``steps`` denoising steps.

        Raises:
            UserError: saying which setting to change.
        """
        last = self._last(steps)
        if last >= steps:
            raise UserError(f"sampler.window.last: got step {last}, expected at most {steps - 1}")
        room = last - self.first + 1
        if self.size > room:
            raise UserError(
                f"sampler.window.size: got {self.size}, but steps {self.first} to {last} are {max(room, 0)}; "
                "lower size, or raise sampler.steps"
            )

    def steps_at(self, steps: int, seed: int, epoch: int) -> tuple[int, ...]:
        """Return the noisy steps, in order, of ``epoch`` (from 1; 0 is what is drawn before training)."""
        choices = range(self.first, self._last(steps) + 1)
        number = max(epoch - 1, 0) // self.every
        room = len(choices) - self.size
        if self.kind == "sliding":
            start = number % (room // self.stride + 1) * self.stride
        else:
            # By hash, because random generators only promise their streams within one version of their library.
            drawn = hashlib.sha256(f"window/{seed}/{number}".encode()).digest()
            start = int.from_bytes(drawn[:8], "big") % (room + 1)
        return tuple(choices[start : start + self.size])

    def _last(self, steps: int) -> int:
        return max(steps - 2, 0) if self.last is None else self.last


def resolve_window(
    window: Sequence[int] | Window | Mapping[str, Any] | None, steps: int
) -> tuple[int, ...] | Window | None:
    """Return the window of a sampler of ``steps`` steps: fixed steps, a moving one, or ``None`` for all steps.

    Raises:
        UserError: it does not fit into the steps, or its settings are wrong.
    """
    if window is None:
        return None
    if isinstance(window, Mapping):
        try:
            window = Window.model_validate(window)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(("sampler.window", *map(str, first["loc"])))
            raise UserError(f"{where}: {first['msg'].lower()}, got {first['input']!r}") from None
    if isinstance(window, Window):
        window.check(steps)
        return window
    bad = [step for step in window if not 0 <= step < steps]
    if bad:
        raise UserError(f"sampler.window: got step {bad[0]}, expected steps from 0 to {steps - 1}")
    return tuple(window)
