"""Noise that belongs to the samples, not to the batch: one stream per key, whoever draws from it.

The sampler's own draws are keyed by (seed, epoch, prompt, sample) and a stream's name. Pipelines draw too: x_T, the
noise of an init image, posterior samples of the VAE. Most take a list of generators, one per sample. For those that
take a single generator, or draw without one, :class:`KeyedDraws` gives each row of what is drawn its own sample's
stream.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from difftune.types import SampleKey


def keyed_generator(key: SampleKey, stream: str) -> torch.Generator:
    """Return a CPU generator that depends on the sample's key and the stream's name only."""
    text = f"{key.seed}\x1f{key.epoch}\x1f{key.prompt}\x1f{key.sample}\x1f{stream}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(keys: Sequence[SampleKey], stream: str, like: Tensor) -> Tensor:
    """Return ``(B, *latent)`` standard normal noise, one independent stream per key, on ``like``'s device.

    Drawn on the CPU in fp32 (fp64 if ``like`` is fp64), so that it is the same on every device.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = [torch.randn(like.shape[1:], generator=keyed_generator(key, stream), dtype=dtype) for key in keys]
    return torch.stack(rows).to(like.device)


class KeyedGenerator(torch.Generator):
    """One generator that stands for one per sample; :class:`KeyedDraws` draws each row from its own.

    Attributes:
        rows: the samples' generators.
    """

    rows: list[torch.Generator]

    @staticmethod
    def of(keys: Sequence[SampleKey], stream: str) -> KeyedGenerator:
        """Return a generator over the stream ``stream`` of each key."""
        generator = KeyedGenerator("cpu")
        generator.rows = [keyed_generator(key, stream) for key in keys]
        # What is drawn once for the whole batch (a shared init image) must not depend on who is in it.
        generator.manual_seed(keys[0].seed)
        return generator


_DRAWS = (torch.randn, torch.rand, torch.randn_like, torch.rand_like)


class KeyedDraws(TorchFunctionMode):
    """Keys what a pipeline draws itself, from a :class:`KeyedGenerator` or from no generator at all.

    A tensor with a row, or a block of rows, per sample is drawn row by row from the samples' streams; any other
    shape is drawn from one stream that depends on the seed only. Draws from other generators are left alone.

    Args:
        keys: the keys of the batch.
    """

    def __init__(self, keys: Sequence[SampleKey]) -> None:
        super().__init__()
        self._own = KeyedGenerator.of(keys, "unkeyed")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the four drawing functions; pass everything else on."""
        kwargs = kwargs or {}
        if func not in _DRAWS:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is None:
            generator = self._own
        if not isinstance(generator, KeyedGenerator):
            return func(*args, **kwargs)
        return self._draw(func, generator, args, kwargs)

    @staticmethod
    def _draw(func: Any, generator: KeyedGenerator, args: Any, kwargs: dict[str, Any]) -> Tensor:
        like = args[0] if func in (torch.randn_like, torch.rand_like) else None
        shape = like.shape if like is not None else func(*args, **{**kwargs, "generator": None, "device": "meta"}).shape
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.get_default_dtype())
        device = kwargs.get("device") or (like.device if like is not None else torch.get_default_device())
        draw = torch.rand if func in (torch.rand, torch.rand_like) else torch.randn
        count = len(generator.rows)
        if shape and shape[0] and shape[0] % count == 0:
            rows = (shape[0] // count, *shape[1:])
            drawn = torch.cat([draw(rows, generator=row, dtype=dtype) for row in generator.rows])
        else:
            # A plain generator from here on: C++ reads the subclass's own state.
            drawn = draw(shape, generator=generator, dtype=dtype)
        return drawn.to(device)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Step aside for the block: inside the denoiser nothing is drawn, and its many small calls stay fast."""
        if _get_current_function_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
