"""The tap: what stands between a pipeline and its denoiser during one call.

The pipeline calls its denoiser as always. For the time of a call the tap replaces the module's ``forward`` and, asking
the current driver at each call, runs it without gradients, runs it with gradients (switching grad mode on inside the
pipeline's own ``no_grad``), or skips it and returns zeros of the shape it has been seen to return.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Action = Literal["run", "grad", "skip"]

_CHECKPOINTS = "gradient_checkpointing"


class InferenceModeError(RuntimeError):
    """The pipeline runs in ``torch.inference_mode``, where no graph can be recorded."""


class Tap:
    """Taps a pipeline's denoisers.

    Args:
        modules: component name to module; ControlNets belong here too, since skipped steps skip them.

    Attributes:
        calls: forward passes that were really run since the tap was made (skipped ones do not count).
        rows: the rows of these passes' batches, which is what the papers call denoiser calls; a guided step of one
            picture is two.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        for module in self._modules.values():
            # Some classes of diffusers (ZImageControlNetModel) read this with gradients on and never set it.
            if getattr(module, "_supports_gradient_checkpointing", False) and not hasattr(module, _CHECKPOINTS):
                setattr(module, _CHECKPOINTS, False)
        self._shapes: dict[tuple[Any, ...], Any] = {}
        self.calls = 0
        self.rows = 0

    @contextlib.contextmanager
    def open(
        self,
        decide: Callable[[], Action],
        checkpointing: bool = False,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        *,
        outlived: bool = False,
    ) -> Iterator[Tap]:
        """Tap the modules for the time of the block.

        Args:
            decide: asked before each forward pass.
            checkpointing: recompute the passes with gradients in the backward pass.
            around: what a pass that is run runs in.
            outlived: whether graphs are used after their step. Their passes then get copies of what they are given,
                since some pipelines write the next sample over it (Kandinsky 5).
        """
        originals: list[tuple[nn.Module, bool, Any]] = []
        for name, module in self._modules.items():
            originals.append((module, "forward" in vars(module), module.forward))
            module.forward = self._tapped(name, module.forward, decide, checkpointing, around, outlived)
        try:
            yield self
        finally:
            for module, own, forward in originals:
                if own:
                    module.forward = forward
                else:
                    del module.forward

    def _tapped(
        self,
        name: str,
        forward: Callable[..., Any],
        decide: Callable[[], Action],
        checkpointing: bool,
        around: Callable[[], contextlib.AbstractContextManager[Any]],
        outlived: bool,
    ) -> Callable[..., Any]:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if torch.is_inference_mode_enabled():
                raise InferenceModeError(name)
            action = decide()
            sample = _first_tensor((args, kwargs))
            key = (name, None if sample is None else tuple(sample.shape[1:]), _lengths((args, kwargs)))
            if action == "skip" and key in self._shapes:
                batch, shapes = self._shapes[key]
                return _zeros(shapes, batch, batch if sample is None else len(sample))
            self.calls += 1
            self.rows += 1 if sample is None else len(sample)
            if action == "grad":
                torch.set_grad_enabled(True)
                if outlived:
                    args, kwargs = _copied(args), _copied(kwargs)
                with around():
                    if checkpointing:
                        out = checkpoint(forward, *args, use_reentrant=False, **kwargs)
                    else:
                        out = forward(*args, **kwargs)
            else:
                with around(), torch.no_grad():
                    out = forward(*args, **kwargs)
            if key not in self._shapes:
                self._shapes[key] = (0 if sample is None else len(sample), _shapes_of(out))
            return out

        return tapped


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim > 1 else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        found = _first_tensor(item)
        if found is not None:
            return found
    return None


def _copied(value: Any) -> Any:
    """Return arguments with copies of the tensors in them."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _lengths(value: Any) -> tuple[int, ...]:
    """Return the lengths of list arguments: denoisers that take lists of samples return lists of as many."""
    args, kwargs = value
    return tuple(len(item) for item in (*args, *kwargs.values()) if isinstance(item, list))


def _shapes_of(out: Any) -> Any:
    if isinstance(out, Tensor):
        return ("tensor", tuple(out.shape), out.dtype, out.device)
    if isinstance(out, Mapping):
        return ("mapping", type(out), {key: _shapes_of(value) for key, value in out.items()})
    if isinstance(out, (list, tuple)):
        return ("sequence", type(out), [_shapes_of(value) for value in out])
    return ("constant", out)


def _zeros(shapes: Any, recorded: int, batch: int) -> Any:
    kind = shapes[0]
    if kind == "tensor":
        _, shape, dtype, device = shapes
        rows = batch if shape and shape[0] == recorded else shape[0] if shape else None
        return torch.zeros(shape if rows is None else (rows, *shape[1:]), dtype=dtype, device=device)
    if kind == "mapping":
        return shapes[1](**{key: _zeros(value, recorded, batch) for key, value in shapes[2].items()})
    if kind == "sequence":
        return shapes[1](_zeros(value, recorded, batch) for value in shapes[2])
    return shapes[1]
