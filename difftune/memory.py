"""Memory and speed by name: attention kernels, compilation, tiled decoding, quantised weights, idle encoders.

None of it changes what is computed, beyond rounding, except quantised weights, which are another base model, and tiled
decoding, which blends the tiles' borders. Each setting is diffusers' own; what is missing on a machine is told in one
line before a model is loaded.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from difftune.types import UserError

T = TypeVar("T")

Attention = Literal["auto", "sdpa", "math", "efficient", "cudnn", "flash", "xformers"]
"""Attention kernels that have a backward pass: torch's (``sdpa`` chooses among its own three, each of which can be
named) and two packages'. ``auto`` leaves the model as it is."""

Compile = Literal["no", "full", "blocks"]
"""Whether the denoiser is compiled: not, as a whole, or by its repeated blocks, which takes a fraction of the time."""

Quantize = Literal["bnb-8bit", "bnb-4bit", "torchao-int8"]
"""How frozen weights are stored: LLM.int8() or NF4 by bitsandbytes, or int8 weights by torchao."""

#: diffusers' names of the kernels.
_BACKENDS = {
    "sdpa": "native",
    "math": "_native_math",
    "efficient": "_native_efficient",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "xformers": "xformers",
}

#: Setting to the module it needs and the line that installs it.
_PACKAGES = {
    "flash": ("flash_attn", "pip install flash-attn"),
    "xformers": ("xformers", "pip install 'difftune[xformers]'"),
    "bnb-8bit": ("bitsandbytes", "pip install 'difftune[quant]'"),
    "bnb-4bit": ("bitsandbytes", "pip install 'difftune[quant]'"),
    "torchao-int8": ("torchao", "pip install 'difftune[quant]'"),
}

#: Settings whose kernels exist for GPUs only.
_GPU_ONLY = ("efficient", "cudnn", "flash", "xformers", "bnb-8bit", "bnb-4bit")

#: The compiler behind torch.compile.
COMPILER: str | Callable[..., Any] = "inductor"


def require(setting: str, name: str, device: str) -> None:
    """Refuse a kernel or a quantisation that this machine cannot run.

    Args:
        setting: the key, for the message.
        name: one of :data:`Attention` or :data:`Quantize`.
        device: ``cuda``, ``mps`` or ``cpu``.

    Raises:
        UserError: the package is missing, or there is no GPU.
    """
    package, remedy = _PACKAGES.get(name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{setting}: {name} needs {package}, which is not installed: {remedy}")
    if name in _GPU_ONLY and device != "cuda":
        raise UserError(f"{setting}: {name} runs on CUDA GPUs only, and the run computes on {device}; leave it out")


def require_compiler(device: str) -> None:
    """Refuse compilation where there is nothing to compile with.

    Raises:
        UserError: no C++ compiler (CPU), or no triton (GPU).
    """
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("compile: needs a C++ compiler on the CPU, and none is found; install g++, or set compile: no")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("compile: needs triton on the GPU, which is not installed: pip install triton")


# -- attention -------------------------------------------------------------------------------------------------------


def set_attention(module: nn.Module, name: str) -> None:
    """Let a denoiser's attention run on the kernel ``name`` (:data:`Attention`), through diffusers' dispatcher.

    Denoisers from before the dispatcher (UNets, Stable Diffusion 3, PixArt) call torch's attention themselves: for
    them there are ``sdpa`` and, by diffusers' older way, ``xformers``.

    Raises:
        UserError: the model cannot use the kernel, or the package is missing or too old.
    """
    if name == "auto":
        return
    kind = type(module).__name__
    processors = [getattr(layer, "processor", None) for layer in module.modules()]
    try:
        if any(hasattr(processor, "_attention_backend") for processor in processors):
            from diffusers.models.attention_dispatch import attention_backend

            # diffusers also makes it the kernel of every other model of the process; leaving the block undoes that.
            with attention_backend("native"):
                module.set_attention_backend(_BACKENDS[name])  # type: ignore[operator]
        elif name == "xformers" and hasattr(module, "enable_xformers_memory_efficient_attention"):
            module.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        elif name != "sdpa":
            raise UserError(f"model.attention: {kind} knows sdpa and xformers only, got {name}; choose sdpa")
    except (RuntimeError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.attention: {name} cannot be used by {kind} ({_first_line(error)})") from error


# -- compilation -----------------------------------------------------------------------------------------------------


def compile_denoiser(module: nn.Module, how: Compile) -> None:
    """Compile a denoiser in place; what runs it (the pipeline's loop, guidance, the step) stays as it is.

    With gradients and without, compiled code rounds differently: ratios are 1 to within about 1e-6, not exactly.

    Raises:
        UserError: ``blocks``, and the model does not say which blocks it repeats.
    """
    if how == "no":
        return
    # One version per batch size, with and without gradients, with the adapter on and off: more than torch's eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if how == "full":
        # The forward, not the module: a sampler decides around it whether it runs at all.
        module.forward = torch.compile(module.forward, backend=COMPILER)
        return
    if not getattr(module, "_repeated_blocks", None):
        raise UserError(f"compile: {type(module).__name__} names no repeated blocks; set compile: full")
    module.compile_repeated_blocks(backend=COMPILER)  # type: ignore[operator]


# -- the autoencoder -------------------------------------------------------------------------------------------------


def set_vae(pipe: Any, *, tiling: bool, slicing: bool) -> None:
    """Let the pipeline's autoencoder work in tiles, or on one picture at a time.

    Raises:
        UserError: it has no autoencoder, or one that cannot.
    """
    for name, wanted in (("tiling", tiling), ("slicing", slicing)):
        if not wanted:
            continue
        vae = getattr(pipe, "vae", None)
        enable = getattr(vae, f"enable_{name}", None)
        try:
            if enable is None:
                raise NotImplementedError
            enable()
        except NotImplementedError:
            whose = type(pipe).__name__ if vae is None else type(vae).__name__
            raise UserError(f"model.vae_{name}: {whose} has no {name}; leave it out") from None


# -- quantised weights -----------------------------------------------------------------------------------------------


def quantization(
    index: Mapping[str, Any], parts: Mapping[str, Quantize], dtype: torch.dtype, denoisers: Callable[[str], bool]
) -> Any:
    """Return diffusers' description of the components to quantise while they are loaded.

    Args:
        index: the pipeline's ``model_index.json``: component to (library, class).
        parts: ``denoiser`` or ``text_encoders`` (of those the language models: CLIP's are small) to how.
        dtype: what is computed in.
        denoisers: says of a component's name whether it is the denoiser.

    Raises:
        UserError: the pipeline has no such component.
    """
    from diffusers import PipelineQuantizationConfig

    classes = {name: value for name, value in index.items() if isinstance(value, (list, tuple)) and value[0]}
    mapping = {}
    for part, how in parts.items():
        if part == "denoiser":
            found = [name for name in classes if denoisers(name)]
        else:
            found = [n for n, (_, kind) in classes.items() if n.startswith("text_encoder") and "CLIP" not in kind]
        # Presets name both: a pipeline whose encoders are all CLIP's has none to quantise.
        if not found and part == "denoiser":
            raise UserError(f"model.quantize: the model has no {part} among {', '.join(classes)}")
        mapping.update({name: _quantized(how, classes[name][0], dtype) for name in found})
    return PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None


def _quantized(how: Quantize, library: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    # Each library loads its own components, by its own class of the same name.
    source: Any = transformers if library == "transformers" else diffusers
    if how == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return source.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    if how == "bnb-8bit":
        return source.BitsAndBytesConfig(load_in_8bit=True)
    return source.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


# -- what is idle ----------------------------------------------------------------------------------------------------


class IdleEncoders:
    """Keeps a pipeline's text and image encoders in the host's memory, except while they encode.

    accelerate's hooks bring an encoder to the device when it is called; :meth:`rest` sends it back. The sampler calls
    that at every pass of the denoiser, which is when embeddings are done with.

    Args:
        pipe: the pipeline.
        modules: its networks by component name.
    """

    def __init__(self, pipe: Any, modules: Mapping[str, nn.Module]) -> None:
        self._pipe = pipe
        self.modules = {n: m for n, m in modules.items() if n.startswith(("text_encoder", "image_encoder"))}
        self._others = [name for name in modules if name not in self.modules]
        self._hooks: list[Any] = []
        self._awake = False
        for module in self.modules.values():
            module.register_forward_pre_hook(self._wake)

    def to(self, device: torch.device | str) -> None:
        """Put the encoders into the host's memory, to be brought to ``device`` when they are called."""
        from accelerate import cpu_offload_with_hook

        for hook in self._hooks:
            hook.remove()
        self._hooks = [cpu_offload_with_hook(module, torch.device(device))[1] for module in self.modules.values()]
        # A pipeline asks its components where it computes: those that are not hooked are where they seem to be.
        self._pipe._exclude_from_cpu_offload = self._others

    def _wake(self, *_: Any) -> None:
        self._awake = True

    def rest(self) -> None:
        """Send the encoders that have been called back to the host's memory."""
        if not self._awake:
            return
        self._awake = False
        for hook in self._hooks:
            hook.offload()


@contextlib.contextmanager
def brought(things: Iterable[Any], device: torch.device | str, idle: bool) -> Iterator[None]:
    """Have things that can be moved on ``device`` for the block and in the host's memory after it, if ``idle``."""
    moved = list(things) if idle else []
    for thing in moved:
        thing.to(device)
    try:
        yield
    finally:
        for thing in moved:
            thing.to("cpu")


# -- memory that is exhausted ----------------------------------------------------------------------------------------


#: What backends say that raise no torch.OutOfMemoryError: HIP, MPS, the host, HPU and
#: cuDNN, as accelerate knows them, and cuBLAS.
_EXHAUSTED = (
    " out of memory.",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error says that a memory is exhausted: the GPU's, Apple's, the host's or cuBLAS's workspace."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # Ours may quote such a line, after all that can be tried was.
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    return any(line in str(error) for line in _EXHAUSTED)


def out_of_memory(what: str, size: int, error: BaseException) -> str:
    """Return the line that says what to do when ``size`` samples in ``what`` are too many and cannot be made fewer."""
    return (
        f"out of memory in {what} of {size} ({_first_line(error).rstrip('.')}), and no smaller one can be tried: set "
        "gradient_checkpointing: true, model.dtype: bf16, offload: [text_encoders, reward] or model.quantize, lower "
        "sampler.height and width, or begin with a preset (8GB, 12GB, 24GB)"
    )


def halving(
    attempt: Callable[[int], T], size: int, what: str, *, smallest: int = 1, undo: Callable[[int], str]
) -> T:
    """Return ``attempt(size)``, with half as many samples for as long as memory does not hold them.

    Args:
        attempt: number of samples -> the outcome.
        size: how many to begin with.
        what: what needs the memory, for the message.
        smallest: how few can be tried.
        undo: number of samples to be tried next -> what the user is told; takes back what the failed attempt left.

    Raises:
        UserError: memory does not hold ``smallest``.
    """
    while True:
        try:
            return attempt(size)
        except Exception as error:
            if not is_exhausted(error):
                raise
            if size <= smallest:
                raise UserError(out_of_memory(what, size, error)) from None
        # Outside of the handler: the error holds on to the graph that did not fit.
        size = max(size // 2, smallest)
        told = undo(size)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: {told}", stacklevel=3)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
