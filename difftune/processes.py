"""The processes of a run: what they exchange, and how they stop together.

Every process holds the policy and does a share of the samples; what it learns from them (scores, gradients, metrics)
is exchanged, so that all take the same step. A process that fails or is interrupted must not leave the others waiting
for it: work that can fail by itself runs in :meth:`Processes.together`, which raises in all what was raised in one.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from difftune.policy import Policy
from difftune.types import UserError

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProcessError(RuntimeError):
    """Another process of the run has ended, or failed with an error that cannot be sent; the message says which."""


class Processes:
    """The processes that accelerate has joined; alone, every method does the work and nothing else.

    Args:
        accelerator: knows the processes and their device.

    Attributes:
        rank: this process's number, from 0.
        count: how many there are.
        sharded: whether the base model's weights lie scattered over the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.sharded = False
        self._interrupted = False
        self._interruptible = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    # -- stopping together ---------------------------------------------------------------------------------------

    def together(self, work: Callable[..., T], *args: Any) -> T:
        """Return ``work(*args)`` once every process has done its own, different work.

        Every process must come here at the same time, and ``work`` must not exchange anything.

        Raises:
            KeyboardInterrupt: in all processes, if any was interrupted.
            Exception: in all processes the error of the first in which the work failed. An error that cannot be sent
                is raised elsewhere as a :class:`ProcessError` with its type and message.
        """
        if self.count == 1:
            return work(*args)
        result: Any = None
        error: BaseException | None = None
        try:
            try:
                self._interruptible = True
                if self._interrupted:
                    raise KeyboardInterrupt
                result = work(*args)
            finally:
                self._interruptible = False
        except BaseException as raised:
            error = raised
        self._settle(error)
        return result

    def in_step(self, work: Callable[..., T], *args: Any) -> T:
        """Return ``work(*args)``, where the work runs the denoiser.

        That is :meth:`together`, unless the model is sharded. Then the work exchanges weights at every layer: all
        processes must call the denoiser equally often, and a process that fails on the way cannot tell the others,
        so it breaks the connection that they wait at.

        Raises:
            ProcessError: another process failed or ended while this one was at work.
        """
        if not self.sharded:
            return self.together(work, *args)
        self.together(lambda: None)
        try:
            with _ended(only_exchanges=True):
                return work(*args)
        except BaseException:
            torch.distributed.destroy_process_group()
            raise

    def _settle(self, error: BaseException | None) -> None:
        try:
            found = self.gather(None if error is None else _Failure.of(error))
        except ProcessError:
            # Our own reason says more than that the others are gone.
            if error is not None:
                raise error from None
            raise
        failures = {rank: failure for rank, failure in enumerate(found) if failure is not None}
        if not failures:
            return
        self._interrupted = False
        # An interruption goes first: the state it saves is good, whatever fails beside it on the way out.
        chosen = min(failures, key=lambda rank: (failures[rank].kind != "KeyboardInterrupt", rank))
        if error is not None and chosen == self.rank:
            raise error
        raise failures[chosen].error() from error

    def shard(self, policy: Policy) -> None:
        """Scatter the weights of the policy's frozen base over the processes (FSDP2, Zhao et al. 2023).

        Each layer's weights are gathered for its own forward and backward pass only. The layers are those that
        diffusers keeps whole when it places a model on several devices (``_no_split_modules``); a model that names none
        is gathered as one. The trained weights stay whole in every process, so that adapters, checkpoints and the
        optimizer are what they are without sharding.

        Raises:
            UserError: the whole model is trained, or the run has one process.
        """
        if self.count == 1:
            raise UserError(
                "train.sharding: fsdp scatters the model over processes, and this run has one; start it with "
                "accelerate launch or torchrun, or set train.sharding to none"
            )
        if policy.lora is None:
            raise UserError(
                "train.sharding: fsdp scatters the frozen base of a LoRA, and this run trains the model itself (lora: "
                "null); set train.sharding to none"
            )
        mesh = init_device_mesh(self.accelerator.device.type, (self.count,))
        trained = set(policy.parameters())
        for module in policy.denoisers.values():
            names = set(getattr(module, "_no_split_modules", None) or ())
            layers = [layer for layer in module.modules() if type(layer).__name__ in names and layer is not module]
            # From the inside out: a layer takes what no layer within it has taken.
            for layer in [*reversed(layers), module]:
                if any(parameter not in trained for parameter in layer.parameters()):
                    fully_shard(layer, mesh=mesh, ignored_params=trained)
        self.sharded = True

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block SIGINT and SIGTERM interrupt this process's own work, and wait while it exchanges.

        An exchange that only some processes leave would never end. Alone, or in another than the main thread, signals
        are left as they are.
        """
        if self.count == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._interrupted = self._interrupted, True
        if self._interruptible and not again:
            raise KeyboardInterrupt

    def interrupt(self) -> None:
        """Interrupt all processes when they next meet in :meth:`together`."""
        self._interrupted = True

    # -- exchanging ----------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank; values travel pickled, tensors should be on the CPU.

        Raises:
            ProcessError: another process has ended.
        """
        if self.count == 1:
            return [value]
        with _ended():
            return gather_object([value])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over all processes; none counts as 0.

        Raises:
            ProcessError: another process has ended.
        """
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # One message per dtype: an adapter has hundreds of small tensors.
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            same = [gradient for gradient in gradients if gradient.dtype == dtype]
            with _ended():
                total = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in same]), "sum")
            for gradient, part in zip(same, total.split([gradient.numel() for gradient in same]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the first process; all must give the same names, shapes and dtypes.

        Raises:
            ProcessError: another process has ended.
        """
        if self.count == 1:
            return tensors
        with _ended():
            return {name: broadcast(value.contiguous()) for name, value in tensors.items()}


@contextlib.contextmanager
def _ended(only_exchanges: bool = False) -> Iterator[None]:
    """Say in one line that an exchange broke off, which torch does in many.

    ``only_exchanges`` lets errors through that are of something else, as far as their text tells.
    """
    try:
        yield
    except RuntimeError as error:
        if only_exchanges and not re.search(r"gloo|nccl|closed by peer|process group", str(error), re.IGNORECASE):
            raise
        reason = str(error).strip().splitlines()[0][:120]
        raise ProcessError(f"another process of the run has ended or no longer answers ({reason})") from error


@dataclass(frozen=True)
class _Failure:
    """What a process tells the others of its error: type, message and, where it can be pickled, the error itself."""

    kind: str
    message: str
    pickled: bytes

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        try:
            pickled = pickle.dumps(error)
        except Exception:
            pickled = b""
        return cls(type(error).__name__, str(error), pickled)

    def error(self) -> BaseException:
        """Return the error, or a :class:`ProcessError` that tells of it where it does not come back whole."""
        with contextlib.suppress(Exception):
            error = pickle.loads(self.pickled)
            if type(error).__name__ == self.kind and str(error) == self.message:
                return error
        return ProcessError(f"{self.kind}: {self.message}")


def even_shares(count: int, processes: int) -> list[list[int]]:
    """Cut 0 ... count - 1 into one run per process, of lengths that differ by one at most; the first are the longer."""
    bounds = [-(-count * rank // processes) for rank in range(processes + 1)]
    return [list(range(start, stop)) for start, stop in zip(bounds, bounds[1:], strict=False)]
