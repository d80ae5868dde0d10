"""The policy: a diffusers pipeline whose denoiser carries trainable weights, a LoRA adapter by default.

The pipeline's object is used as it is; nothing is copied. Further *named adapters* (``old``, ``ema``, reference
checkpoints) are stored values of the same trainable parameters that :meth:`Policy.adapter` puts in place for a while:
never a second copy of the model. The reference policy is the model with the adapter off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from difftune.memory import (
    Attention,
    Compile,
    IdleEncoders,
    Quantize,
    compile_denoiser,
    quantization,
    set_attention,
    set_vae,
)
from difftune.types import UserError
from difftune.zoo import MODELS, model_path

#: Attention projections of diffusers' UNets and transformers: what a LoRA trains unless the config says more.
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

#: Components that a diffusers pipeline's loop calls to denoise, by name, in the order they are looked for.
_DENOISERS = ("unet", "transformer", "transformer_2", "dit", "denoiser")

#: Names that mean the denoiser only where there is none of the above (elsewhere a VAE's half or an earlier stage).
_DENOISERS_ELSE = ("decoder", "prior")

#: Components that never are the denoiser of a pipeline that does not use the names above.
_NOT_DENOISERS = (
    "vae",
    "vqvae",
    "vqgan",
    "movq",
    "latent_upsampler",
    "adapter",
    "text_encoder",
    "image_encoder",
    "safety_checker",
    "controlnet",
    "tokenizer",
    "vocoder",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LoraConfig(BaseModel):
    """A low-rank adapter (Hu et al. 2021) on the denoiser's linear layers: W + (alpha / rank) B A."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(8, ge=1, description="Rank r of the update.")
    alpha: float | None = Field(None, gt=0, description="Scale alpha; null means alpha = rank, a factor of 1.")
    targets: list[str] | str | None = Field(
        None,
        description="Layers to adapt: a list of name endings, a regular expression over full names, or null for the "
        "attention projections.",
    )
    init: str = Field(
        "default",
        pattern="^(default|gaussian)$",
        description="default: A by Kaiming, B zero; gaussian: A normal with std 1/rank, B zero.",
    )


DEFAULT_LORA = LoraConfig()


class ModelConfig(BaseModel):
    """Which pipeline to load, and how."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="An embedded model (difftune/tiny-sd), a hub id, or a folder.")
    revision: str | None = Field(None, description="Hub revision to pin.")
    variant: str | None = Field(None, description="Weight variant on the hub, e.g. fp16.")
    dtype: str = Field("fp32", pattern="^(fp32|bf16|fp16)$", description="Dtype of the frozen base; adapters are fp32.")
    scheduler: str | None = Field(
        None, description="Scheduler class of diffusers to use in place of the model's own, made from its config."
    )
    quantize: Quantize | dict[Literal["denoiser", "text_encoders"], Quantize] | None = Field(
        None,
        description="Frozen weights in 8 or 4 bits: of the denoiser, or a mapping for denoiser and text_encoders "
        "(of those the language models).",
    )
    attention: Attention = Field(
        "auto",
        description="The denoiser's attention kernel: sdpa (torch chooses), one of its math, efficient and cudnn, or "
        "those of flash-attn and xformers; auto: the model's own.",
    )
    vae_tiling: bool = Field(False, description="Decode large pictures in tiles: less memory, blended borders.")
    vae_slicing: bool = Field(False, description="Decode one picture at a time: less memory.")

    @property
    def quantized_parts(self) -> dict[str, Quantize]:
        """How the denoiser and the text encoders are quantised; a bare name means the denoiser."""
        if isinstance(self.quantize, str):
            return {"denoiser": self.quantize}
        return {str(part): how for part, how in (self.quantize or {}).items()}


def load_pipeline(
    model: str | Path | Any,
    *,
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    device: str | torch.device | None = None,
    quantize: Mapping[str, Quantize] | None = None,
    attention: Attention = "auto",
    vae_tiling: bool = False,
    vae_slicing: bool = False,
) -> Any:
    """Load a diffusers pipeline.

    Args:
        model: an embedded model (``difftune/tiny-sd``), a hub id, a folder in diffusers' layout, or a pipeline object,
            which is returned as it is (moved to ``device`` if one is named).
        dtype: ``fp32``, ``bf16``, ``fp16`` or a torch dtype for the weights.
        revision: hub revision to pin.
        variant: weight variant on the hub.
        scheduler: name of a diffusers scheduler class to use in place of the model's own.
        device: where to put the pipeline; unchanged by default.
        quantize: how the frozen weights of the ``denoiser`` and the ``text_encoders`` are stored; as they are by
            default. Not for pipeline objects.
        attention: the denoiser's attention kernel.
        vae_tiling, vae_slicing: let the autoencoder work in tiles, or on one picture at a time.

    Raises:
        UserError: the model does not exist, is not a pipeline, or cannot do what is asked for.
    """
    with _quiet():
        pipe = _load(model, dtype, revision, variant, scheduler, quantize or {})
        if attention != "auto":
            for module in find_denoisers(pipe).values():
                set_attention(module, attention)
    set_vae(pipe, tiling=vae_tiling, slicing=vae_slicing)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


def _load(
    model: str | Path | Any,
    dtype: str | torch.dtype,
    revision: str | None,
    variant: str | None,
    scheduler: str | None,
    quantize: Mapping[str, Quantize],
) -> Any:
    import diffusers

    if not isinstance(model, (str, Path)):
        pipe = model
    else:
        name = str(model)
        torch_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
        if name in MODELS or name.startswith("difftune/"):
            if name not in MODELS or MODELS[name].kind != "pipeline":
                known = ", ".join(sorted(k for k, m in MODELS.items() if m.kind == "pipeline"))
                raise UserError(f"model: got {name!r}, expected one of the embedded pipelines: {known}")
            source = str(model_path(name))
        else:
            source = name
            if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
                raise UserError(
                    f"model: got {name!r}, which is not a folder; expected a folder in diffusers' layout, a hub id "
                    f"(owner/name), or one of {', '.join(MODELS)}"
                )
        # diffusers renamed the argument and warns of the old name.
        dtype_name = "dtype" if _version(diffusers.__version__) >= (0, 42) else "torch_dtype"
        options: dict[str, Any] = {dtype_name: torch_dtype, "revision": revision, "variant": variant}
        try:
            if quantize:
                index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
                options["quantization_config"] = quantization(index, quantize, torch_dtype, _is_denoiser)
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, **options)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model: {name!r} could not be loaded ({reason}); expected a diffusers pipeline: check the name, "
                "the network, and for gated models the access token"
            ) from error
        if name in MODELS:
            pipe.difftune_call = dict(MODELS[name].call)
    if scheduler is not None:
        cls = getattr(diffusers, scheduler, None)
        if cls is None:
            raise UserError(f"model.scheduler: diffusers has no {scheduler!r}, expected e.g. DDIMScheduler")
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
    return pipe


def _is_denoiser(component: str) -> bool:
    return component in _DENOISERS or component in _DENOISERS_ELSE


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loaders' progress bars (one per component), and that torchvision is missing, off the terminal."""
    import transformers.utils.logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    # Image processors fall back to PIL by themselves; nothing is lost that the user should hear of.
    transformers_logging.set_verbosity_error()
    import diffusers.utils.logging as diffusers_logging

    both = (diffusers_logging, transformers_logging)
    shown = [module.is_progress_bar_enabled() for module in both]
    for module in both:
        module.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for module, was in zip(both, shown, strict=True):
            if was:
                module.enable_progress_bar()


def pipeline_modules(pipe: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by component name; of a plain object, its attributes that are modules."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        components = {k: v for k, v in vars(pipe).items() if not k.startswith("_")}
    return {name: value for name, value in components.items() if isinstance(value, nn.Module)}


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Return the pipeline's denoising networks by component name (Wan 2.2 has two).

    Known names are taken first; a pipeline of the user's own may call its network anything, as long as it is the only
    module that is not an autoencoder, encoder or checker.
    """
    modules = pipeline_modules(pipe)
    known = {name: modules[name] for name in _DENOISERS if name in modules}
    if known:
        return known
    for name in _DENOISERS_ELSE:
        if name in modules:
            return {name: modules[name]}
    others = {name: m for name, m in modules.items() if not name.startswith(_NOT_DENOISERS)}
    if len(others) == 1:
        return others
    raise UserError(
        f"{type(pipe).__name__}: cannot tell the denoiser among {', '.join(modules) or 'no modules'}; "
        "expected a component called unet or transformer: name it with Policy(pipe, denoisers=[...])"
    )


class Policy:
    """A pipeline with trainable weights.

    Args:
        pipe: a diffusers pipeline, or any object of the kind with ``scheduler``, a denoiser and ``__call__``.
        lora: the adapter to attach; ``None`` trains whatever already requires grad.
        denoisers: component names to train, found by themselves in diffusers' pipelines.
        gradient_checkpointing: trade time for memory in the denoiser.
        compile: compile the denoiser, as a whole (``full``) or by its repeated ``blocks``.
        idle_encoders: keep text and image encoders in the host's memory, except while they encode.

    Raises:
        UserError: no denoiser, no layer matches ``lora.targets``, or nothing requires grad.

    Attributes:
        pipe: the pipeline.
        denoisers: component name to module.
        lora: the adapter's settings, or ``None``.
        compiled: whether the denoiser is compiled, so that ratios are 1 up to rounding only.
    """

    adapter_name = "default"

    def __init__(
        self,
        pipe: Any,
        lora: LoraConfig | None = DEFAULT_LORA,
        *,
        denoisers: Sequence[str] | None = None,
        gradient_checkpointing: bool = False,
        compile: Compile = "no",
        idle_encoders: bool = False,
    ) -> None:
        self.pipe = pipe
        self.lora = lora
        self.compiled = compile != "no"
        self.denoisers = (
            find_denoisers(pipe) if denoisers is None else {name: getattr(pipe, name) for name in denoisers}
        )
        self._stored: dict[str, dict[str, Tensor]] = {}
        self._initial: dict[str, Tensor] | None = None
        if lora is None:
            self._freeze(keep_denoisers=True)
        else:
            self._freeze(keep_denoisers=False)
            for name, module in self.denoisers.items():
                _attach(name, module, lora, self.adapter_name)
        for module in self.denoisers.values():
            module.eval()
            if gradient_checkpointing:
                _enable_checkpointing(module)
            compile_denoiser(module, compile)
        self._idle = IdleEncoders(pipe, pipeline_modules(pipe)) if idle_encoders else None
        if not self.parameters():
            raise UserError(
                f"{type(pipe).__name__}: nothing to train, expected parameters that require grad; "
                "pass lora=LoraConfig(...) or call requires_grad_(True) on the denoiser first"
            )
        for parameter in self.parameters():
            # fp16 adapters cannot be unscaled and lose small updates: trained weights are always fp32.
            parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
        if lora is None:
            # The reference of a fully trained model is the model as it came.
            self._initial = {k: p.detach().clone() for k, p in self.named_parameters().items()}

    def _freeze(self, keep_denoisers: bool) -> None:
        for module in pipeline_modules(self.pipe).values():
            if not (keep_denoisers and any(module is denoiser for denoiser in self.denoisers.values())):
                module.requires_grad_(False).eval()
        if not keep_denoisers:
            for module in self.denoisers.values():
                module.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(next(iter(self.denoisers.values())).parameters()).device

    def to(self, device: torch.device | str) -> Policy:
        """Move the pipeline and the stored adapters to ``device`` and return the policy."""
        modules = list(pipeline_modules(self.pipe).values())
        if self._idle is not None:
            idle = list(self._idle.modules.values())
            modules = [module for module in modules if not any(module is one for one in idle)]
            self._idle.to(device)
        if self._idle is None and hasattr(self.pipe, "to") and all(hasattr(module, "dtype") for module in modules):
            self.pipe.to(device)
        else:
            # diffusers' own .to() asks every module for its dtype, which a plain nn.Module does not have.
            for module in modules:
                module.to(device)
        for values in (*self._stored.values(), *([self._initial] if self._initial else [])):
            for key in values:
                values[key] = values[key].to(device)
        return self

    def rest(self) -> None:
        """Send encoders that are idle to the host's memory, with ``idle_encoders``."""
        if self._idle is not None:
            self._idle.rest()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by ``component.path``, in a fixed order."""
        return {
            f"{component}.{name}": parameter
            for component, module in self.denoisers.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters, in a fixed order."""
        return list(self.named_parameters().values())

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Run the block under the reference policy: the adapter off, or the weights training began with."""
        if self._initial is not None:
            with self._values(self._initial):
                yield
            return
        layers = list(self._adapted_layers())
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _adapted_layers(self) -> Iterator[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.denoisers.values():
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    yield layer

    # -- named adapters ----------------------------------------------------------------------------------

    def store_adapter(self, name: str) -> None:
        """Store the current trainable values as the adapter ``name`` (made or overwritten)."""
        self._stored[name] = {k: p.detach().clone() for k, p in self.named_parameters().items()}

    def update_adapter(self, name: str, decay: float) -> None:
        """Move the stored adapter towards the current values: stored = decay * stored + (1 - decay) * current.

        The adapter is made from the current values if there is none of that name.
        """
        if name not in self._stored:
            self.store_adapter(name)
            return
        for key, parameter in self.named_parameters().items():
            self._stored[name][key].lerp_(parameter.detach(), 1.0 - decay)

    def adapters(self) -> list[str]:
        """Return the names of the stored adapters."""
        return sorted(self._stored)

    @contextlib.contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Run the block with the stored adapter ``name`` in place; ``reference`` and ``default`` are always there."""
        if name == "reference":
            with self.reference():
                yield
        elif name == self.adapter_name:
            yield
        elif name not in self._stored:
            raise KeyError(f"no adapter {name!r}, stored are {self.adapters()}: call store_adapter first")
        else:
            with self._values(self._stored[name]):
                yield

    @contextlib.contextmanager
    def _values(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        current = self.named_parameters()
        kept = {key: parameter.data for key, parameter in current.items()}
        for key, parameter in current.items():
            parameter.data = values[key]
        try:
            yield
        finally:
            for key, parameter in current.items():
                parameter.data = kept[key]

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the trainable values and of all stored adapters, as ``adapter/component.path``."""
        state = {f"{self.adapter_name}/{k}": p.detach().clone() for k, p in self.named_parameters().items()}
        for name, values in self._stored.items():
            state.update({f"{name}/{key}": value.clone() for key, value in values.items()})
        if self._initial is not None:
            state.update({f"initial/{key}": value.clone() for key, value in self._initial.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, in place: the optimizer keeps its parameters.

        Raises:
            UserError: the state belongs to another model or adapter (names or shapes differ).
        """
        current = self.named_parameters()
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            adapter, _, name = key.partition("/")
            groups.setdefault(adapter, {})[name] = value
        mine = groups.pop(self.adapter_name, {})
        if mine.keys() != current.keys() or any(mine[k].shape != current[k].shape for k in mine):
            odd = sorted(mine.keys() ^ current.keys())
            what = odd[0] if odd else next(k for k in mine if mine[k].shape != current[k].shape)
            raise UserError(
                f"checkpoint: {len(mine)} trained tensors do not match the policy's {len(current)} (first: {what}); "
                "resume with the model and lora settings of the run"
            )
        with torch.no_grad():
            for key, parameter in current.items():
                parameter.copy_(mine[key])
        initial = groups.pop("initial", None)
        if initial is not None:
            self._initial = {k: v.to(self.device).clone() for k, v in initial.items()}
        self._stored = {n: {k: v.to(self.device).clone() for k, v in g.items()} for n, g in groups.items()}


def _attach(component: str, module: nn.Module, lora: LoraConfig, adapter: str) -> None:
    """Inject the LoRA layers into ``module``, through diffusers' mixin where it has one."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    targets = lora.targets if lora.targets is not None else _default_targets(component, module)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        init_lora_weights=True if lora.init == "default" else "gaussian",
        lora_dropout=0.0,
    )
    if adapter in getattr(module, "peft_config", {}):
        raise UserError(f"{component}: already carries an adapter; pass a fresh pipeline, or lora=None to train it")
    try:
        add_adapter: Any = getattr(module, "add_adapter", None)
        if add_adapter is not None:
            add_adapter(config, adapter_name=adapter)
        else:
            inject_adapter_in_model(config, module, adapter_name=adapter)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in module.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"lora.targets: {targets!r} matches no layer of {component} ({str(error).splitlines()[0][:120]}); "
            f"its linear layers end in {', '.join(linear)}"
        ) from error


def _default_targets(component: str, module: nn.Module) -> list[str]:
    """Return the attention projections the module has; all linear layers where it has none of those names."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    found = [target for target in DEFAULT_TARGETS if any(n == target or n.endswith("." + target) for n in names)]
    if found:
        return found
    if not any(names):
        raise UserError(
            f"lora: {component} ({type(module).__name__}) has no linear layer; name lora.targets, or train it whole "
            "with lora=None"
        )
    return names


def _enable_checkpointing(module: nn.Module) -> None:
    enable: Any = getattr(module, "enable_gradient_checkpointing", None)
    if enable is None:
        raise UserError(f"gradient_checkpointing: {type(module).__name__} does not support it; set it to false")
    enable()
