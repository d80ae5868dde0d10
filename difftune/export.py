"""The artifact: a LoRA file that stock diffusers, ComfyUI and A1111 load at full strength, and its model
card.

What other programs do with a file decides what is written (all of it tested):

- ``alpha / r`` is **folded into B** in fp32, also where rank or alpha differ by layer, and with
  rank-stabilised scaling. A reader that ignores alpha would otherwise apply the adapter at the wrong strength
  without a word.
- The pipeline class's own ``save_lora_weights`` writes ``pytorch_lora_weights.safetensors``; the settings it
  stores say ``lora_alpha == r``.
- ComfyUI and A1111 do not match the attention keys of a UNet's diffusers file, so UNet families get a second
  file in kohya's layout.
- Two Wan-style experts need two files: the second one's is loaded with ``load_into_transformer_2=True``.
- A pipeline without ``save_lora_weights`` gets one file per component in peft's layout, read by
  :func:`load_adapter`.

Every file is written beside its place, synced and renamed. Its header is written with sorted keys, because
the safetensors library orders them at random and two equal runs would leave different bytes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftune.types import NonFiniteError, UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA."""

WEIGHTS_2 = "pytorch_lora_weights_transformer_2.safetensors"
"""The second expert's LoRA (Wan 2.2), loaded with ``load_into_transformer_2=True``."""

_RESERVED = ("format", "lora_adapter_metadata")
"""Header entries that diffusers reads; ours never replace them."""

_PEFT_DEFAULTS = ("peft_type", "inference_mode", "init_lora_weights", "lora_dropout", "base_model_name_or_path")
"""Settings that matter to training only; a reader of another peft version may not know every field, so few
are kept."""


# Saving


@dataclass(frozen=True)
class _Adapter:
    """One component's adapter, ready to be written: ``W x + B A x`` with no scale beside the tensors.

    Attributes:
        component: name in the pipeline, e.g. ``unet``.
        tensors: peft keys without the adapter's name -> fp32 tensors on the CPU, alpha folded in.
        settings: the entries of a ``peft.LoraConfig`` that rebuild it, with ``lora_alpha == r``.
    """

    component: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether it is nothing but pairs A, B, which is all that kohya's layout holds."""
        return all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in self.tensors)


def save_adapter(
    pipe: Any,
    adapter_name: str,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    base_model: str,
    name: str,
    figures: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write the LoRA ``adapter_name`` of every component of ``pipe`` that carries it, and a model card.

    Args:
        pipe: the pipeline; its components are only read.
        adapter_name: peft's name of the adapter, e.g. ``default``.
        folder: where to write; made if missing.
        config: the run's resolved configuration, for the header and the card.
        metadata: further header entries, strings, e.g. ``{"difftune.rewards": "clip_score"}``.
        base_model: id or folder of the model the adapter belongs to.
        name: the artifact's name, for the kohya file and the card's title; odd characters become ``_``.
        figures: ``{"before": {"reward/mean": ...}, "after": {...}}`` for the card.

    Returns:
        The files written, the weights first.

    Raises:
        NonFiniteError: an adapter tensor is NaN or infinite; nothing was written.
        UserError: no component carries the adapter, it is no LoRA that a file can hold, or ``name`` or
            ``metadata`` are unusable.
    """
    name = _file_name(name)
    adapters = [_collect(component, module, adapter_name) for component, module in _carriers(pipe, adapter_name)]
    if not adapters:
        raise UserError(f"no component of {type(pipe).__name__} carries an adapter {adapter_name!r}")
    header = _header(config, metadata, base_model, name)
    by_name = {adapter.component: adapter for adapter in adapters}
    stock = _stock_groups(pipe, by_name)
    with _staging(folder) as stage:
        for filename, group in stock.items():
            _write_stock(pipe, group, stage, filename, header)
        first = stock.get(WEIGHTS, {})
        if "unet" in first and all(adapter.plain for adapter in first.values()):
            _write_kohya(pipe, first, stage, name, header)
        written = {id(adapter) for group in stock.values() for adapter in group.values()}
        others = [adapter for adapter in adapters if id(adapter) not in written]
        for adapter in others:
            own = {"format": "pt", "difftune.component": adapter.component}
            own["lora_adapter_metadata"] = json.dumps(adapter.settings, sort_keys=True)
            _write(stage / f"{adapter.component}.safetensors", adapter.tensors, {**header, **own})
        weights = sorted(path.name for path in stage.iterdir())
        card = _card(pipe, adapters, weights, others, config, header, base_model, name, figures)
        (stage / "README.md").write_text(card, encoding="utf-8")
        weights.sort(key=lambda file: (file != WEIGHTS, file))
        return _commit(stage, Path(folder), [*weights, "README.md"])


def save_weights(
    pipe: Any,
    folder: str | Path,
    *,
    names: Collection[str] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    base_model: str = "",
    name: str = "weights",
    figures: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write the trained parameters of a run without LoRA, one file per component, and a model card.

    The files hold the parameters under their own names and dtypes; :func:`load_adapter` puts them back, and so does
    ``module.load_state_dict(..., strict=False)``.

    Args:
        pipe: the pipeline; its components are only read.
        folder: where to write; made if missing.
        names: which parameters, as ``component.path``; by default those that require grad.
        config: as in :func:`save_adapter`, like ``metadata``, ``base_model``, ``name`` and ``figures``.

    Raises:
        NonFiniteError: a parameter is NaN or infinite; nothing was written.
        UserError: there is nothing to save, or ``names`` has one that the pipeline has not.
    """
    name = _file_name(name)
    header = _header(config or {}, metadata or {}, base_model, name)
    trained: dict[str, dict[str, Tensor]] = {}
    for component, module in _modules(pipe).items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad if names is None else f"{component}.{key}" in names:
                trained.setdefault(component, {})[key] = parameter.detach().cpu()
    found = {f"{component}.{key}" for component, tensors in trained.items() for key in tensors}
    missing = sorted(set(names or ()) - found)
    if missing or not found:
        what = f"it has no {missing[0]}" if missing else "no parameter requires grad"
        raise UserError(f"nothing to save of {type(pipe).__name__}: {what}")
    for component, tensors in trained.items():
        _check_finite(component, tensors)
    with _staging(folder) as stage:
        for component, tensors in trained.items():
            own = {"format": "pt", "difftune.component": component, "difftune.kind": "weights"}
            _write(stage / f"{component}.safetensors", tensors, {**header, **own})
        weights = sorted(path.name for path in stage.iterdir())
        card = _card(pipe, [], weights, list(trained), config or {}, header, base_model, name, figures)
        (stage / "README.md").write_text(card, encoding="utf-8")
        return _commit(stage, Path(folder), [*weights, "README.md"])


def _modules(pipe: Any) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        # A pipeline of the user's own is any object that holds its networks as attributes.
        components = {key: value for key, value in vars(pipe).items() if not key.startswith("_")}
    return {key: value for key, value in components.items() if isinstance(value, nn.Module)}


def _carriers(pipe: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    for component, module in _modules(pipe).items():
        if adapter_name in _configs(module):
            yield component, module


def _configs(module: nn.Module) -> Mapping[str, Any]:
    """Return the adapters a module carries: name -> peft configuration."""
    configs: Any = getattr(module, "peft_config", None)
    return configs or {}


def _collect(component: str, module: nn.Module, adapter_name: str) -> _Adapter:
    """Read a component's adapter and fold its scales into B."""
    from peft import LoraConfig, get_peft_model_state_dict

    config = _configs(module)[adapter_name]
    if not isinstance(config, LoraConfig):
        raise UserError(f"{component}: adapter {adapter_name!r} is {type(config).__name__}, expected a LoRA")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        # PiSSA, OLoRA and their kin change the base weights, which a LoRA file does not hold.
        raise UserError(
            f"{component}: initialised by {config.init_lora_weights!r}, which alters the base model; "
            "expected true, 'gaussian' or 'orthogonal'"
        )
    state = get_peft_model_state_dict(module, adapter_name=adapter_name, save_embedding_layers=False)
    foreign = [key for key in state if "lora_" not in key]
    if foreign:
        raise UserError(f"{component}: {foreign[0]} is trained beside the LoRA and fits into no LoRA file")
    _check_finite(component, state)
    scales = _scales(module, adapter_name)
    tensors = {}
    for key, value in state.items():
        path, _, part = key.partition(".lora_")
        folded = value.detach().float().cpu()
        if part.startswith(("B.", "embedding_B")):
            folded = folded * scales[path]
        tensors[_published(key, module)] = folded.contiguous()
    _check_finite(component, tensors)
    return _Adapter(component, tensors, _settings(config, list(scales)))


def _scales(module: nn.Module, adapter_name: str) -> dict[str, float]:
    """Return the trained strength of every adapted layer: alpha / r, or alpha / sqrt(r) when rank-stabilised.

    Taken from the layer's own r and alpha, which know the per-layer patterns. The layer's ``scaling`` is not
    used: it is also what ``set_adapters(weights=...)`` turns for one session.
    """
    scales = {}
    for path, layer in module.named_modules():
        if adapter_name in getattr(layer, "lora_alpha", {}):
            rank, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
            stabilised = layer.use_rslora.get(adapter_name, False)
            scales[path] = alpha / (math.sqrt(rank) if stabilised else rank)
    return scales


def _published(key: str, module: nn.Module) -> str:
    """Return the key under the name that files use.

    transformers 5.6 dropped the ``text_model.`` level of CLIPTextModel; files, ComfyUI and A1111 still have
    it, and diffusers takes it off again on loading.
    """
    flat = type(module).__name__ == "CLIPTextModel" and not hasattr(module, "text_model")
    return f"text_model.{key}" if flat else key


def _settings(config: Any, layers: list[str]) -> dict[str, Any]:
    """Return the entries of a LoraConfig that rebuild the folded adapter: what differs from the defaults.

    ``layers`` are the adapted ones: targets given as a regular expression are written out, since a reader would have
    to run the expression.
    """
    default = type(config)().to_dict()
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key not in _PEFT_DEFAULTS and value != default.get(key)
    }
    settings.pop("use_rslora", None)
    ranks = dict(config.rank_pattern or {})
    settings.update(r=config.r, lora_alpha=config.r, rank_pattern=ranks, alpha_pattern=dict(ranks))
    targets = config.target_modules
    settings["target_modules"] = sorted(layers if isinstance(targets, str) else targets or [])
    return settings


def _check_finite(component: str, tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value.detach()).all():
            raise NonFiniteError(
                f"{component}.{key} holds NaN or infinite values; nothing was written, "
                "the last checkpoint is intact: resume from it with a lower learning rate"
            )


def _file_name(name: str) -> str:
    """Return ``name`` with whatever could lead out of a folder, or be markup, replaced.

    Not refused: the name is often a folder's, and the run it belongs to has just finished.
    """
    return re.sub(r"[^\w.+\- ]+", "_", name).strip(". ") or "adapter"


def _header(config: Mapping[str, Any], metadata: Mapping[str, str], base_model: str, name: str) -> dict[str, str]:
    from difftune import __version__

    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"metadata {key!r} is {type(value).__name__}, expected strings: safetensors holds no other")
    own = {
        "difftune.version": __version__,
        "difftune.config": json.dumps(config, sort_keys=True, default=str),
        "difftune.base_model": base_model,
        "difftune.name": name,
    }
    return {**own, **{key: value for key, value in metadata.items() if key not in _RESERVED}}


def _stock_groups(pipe: Any, adapters: Mapping[str, _Adapter]) -> dict[str, dict[str, _Adapter]]:
    """Return file name -> (argument prefix of ``save_lora_weights`` -> adapter) for what diffusers can load."""
    save = getattr(type(pipe), "save_lora_weights", None)
    if save is None or not hasattr(pipe, "load_lora_weights"):
        return {}
    accepted = inspect.signature(save).parameters
    groups: dict[str, dict[str, _Adapter]] = {}
    for component, adapter in adapters.items():
        if f"{component}_lora_layers" in accepted:
            groups.setdefault(WEIGHTS, {})[component] = adapter
        elif component == "transformer_2" and "transformer_lora_layers" in accepted:
            groups.setdefault(WEIGHTS_2, {})["transformer"] = adapter
    return groups


def _write_stock(
    pipe: Any, group: Mapping[str, _Adapter], stage: Path, filename: str, header: Mapping[str, str]
) -> None:
    """Let the pipeline class write the file, then add our entries to its header."""
    save = type(pipe).save_lora_weights
    accepted = inspect.signature(save).parameters
    arguments: dict[str, Any] = {}
    for prefix, adapter in group.items():
        arguments[f"{prefix}_lora_layers"] = adapter.tensors
        if f"{prefix}_lora_adapter_metadata" in accepted:
            arguments[f"{prefix}_lora_adapter_metadata"] = dict(adapter.settings)
    save(save_directory=str(stage), weight_name=filename, safe_serialization=True, **arguments)
    spec = _model_spec(pipe, header["difftune.name"])
    _rewrite_header(stage / filename, {**spec, **header})


def _write_kohya(pipe: Any, group: Mapping[str, _Adapter], stage: Path, name: str, header: Mapping[str, str]) -> None:
    """Write the same tensors in kohya's layout, with the entries that A1111 and ComfyUI nodes look at."""
    from diffusers.utils import convert_state_dict_to_kohya

    tensors = {f"{prefix}.{key}": value for prefix, a in group.items() for key, value in a.tensors.items()}
    converted = convert_state_dict_to_kohya(_equal_ranks(tensors))
    # The converter writes alpha = rank as an integer: the right number for folded tensors, in the wrong type.
    ready = {k: (v.float() if k.endswith(".alpha") else v).contiguous() for k, v in converted.items()}
    ranks = [value.shape[0] for key, value in ready.items() if key.endswith("lora_down.weight")]
    version = _kohya_version(pipe)
    own = {
        "format": "pt",
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(float(max(ranks))),
        "ss_network_args": "{}",
        "ss_output_name": name,
    }
    _write(stage / f"{name}_kohya.safetensors", ready, {**_model_spec(pipe, name), **header, **own})


def _equal_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad every pair A, B with zeros to the largest rank, which changes no product B A.

    diffusers' reader of kohya files loses the alphas of layers that differ from the rest and scales those wrongly.
    """
    rank = max(value.shape[0] for key, value in tensors.items() if key.endswith("lora_A.weight"))
    padded = {}
    for key, value in tensors.items():
        axis = 0 if key.endswith("lora_A.weight") else 1
        shape = [rank - size if i == axis else size for i, size in enumerate(value.shape)]
        padded[key] = torch.cat([value, value.new_zeros(shape)], dim=axis)
    return padded


def _kohya_version(pipe: Any) -> str:
    """Return kohya's name of the base model's generation, by which A1111 decides whether to offer the
    file."""
    if getattr(pipe, "text_encoder_2", None) is not None:
        return "sdxl_base_v1-0"
    return "sd_v2" if getattr(pipe.unet.config, "cross_attention_dim", 768) == 1024 else "sd_v1"


_ARCHITECTURES = {
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v1": "stable-diffusion-v1",
}


def _model_spec(pipe: Any, name: str) -> dict[str, str]:
    """Return the ModelSpec entries, for the families whose architecture id is known; no date, two runs would differ."""
    kind = type(pipe).__name__
    if kind.startswith("StableDiffusion3"):
        architecture = "stable-diffusion-3"
    elif kind.startswith("Flux") and not kind.startswith(("Flux2", "Flux3")):
        architecture = "flux-1-dev"
    elif kind.startswith("StableDiffusion") and getattr(pipe, "unet", None) is not None:
        architecture = _ARCHITECTURES[_kohya_version(pipe)]
        if architecture.endswith("v2-512") and pipe.scheduler.config.get("prediction_type") == "v_prediction":
            architecture = "stable-diffusion-v2-768-v"
    else:
        return {}
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.description": "Trained with rewards by difftune",
    }
    sides = [getattr(pipe, key, None) for key in ("default_sample_size", "vae_scale_factor")]
    if all(isinstance(side, int) for side in sides):
        pixels = int(sides[0]) * int(sides[1])  # type: ignore[arg-type]
        spec["modelspec.resolution"] = f"{pixels}x{pixels}"
    return spec


# Files


@contextlib.contextmanager
def _staging(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder on the same file system as ``folder``, removed afterwards."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _commit(stage: Path, folder: Path, names: list[str]) -> list[Path]:
    """Sync the staged files and rename them into place, in the order given."""
    for name in names:
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(stage / name, folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return [folder / name for name in names]


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    _rewrite_header(path, header)


def _rewrite_header(path: Path, extra: Mapping[str, str]) -> None:
    """Merge ``extra`` below the file's own header entries and sort them; the tensors' bytes stay as they
    are."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    merged = {**extra, **header.pop("__metadata__", {})}
    text = json.dumps({"__metadata__": dict(sorted(merged.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(data)


def _read_header(path: Path) -> dict[str, str]:
    """Return the header's metadata; :class:`UserError` if it is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None


# Loading


def load_adapter(pipe: Any, path: str | Path, adapter_name: str = "default") -> None:
    """Load what :func:`save_adapter` or :func:`save_weights` wrote into ``pipe``.

    LoRA files go through the pipeline's own ``load_lora_weights``; files in peft's layout, and trained
    weights, are put into the components they name.

    Args:
        pipe: a pipeline of the class the file was made for.
        path: the folder, or one of its ``.safetensors`` files (also a kohya file, or a LoRA made elsewhere).
        adapter_name: the name the adapter gets; unused for trained weights.

    Raises:
        UserError: there is no adapter at ``path``, or the pipeline has no such component or parameter.
    """
    source = Path(path)
    files = [source] if source.is_file() else _adapter_files(source)
    for file in files:
        header = _read_header(file)
        component = header.get("difftune.component")
        if component is not None:
            _load_component(pipe, component, file, header, adapter_name)
        elif not hasattr(pipe, "load_lora_weights"):
            raise UserError(f"{file} is a LoRA file, but {type(pipe).__name__} cannot load one: wrong base model?")
        else:
            options = {"load_into_transformer_2": True} if file.name == WEIGHTS_2 else {}
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter_name, **options)


def _adapter_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"no adapter at {str(folder)!r}: expected a folder with {WEIGHTS}, or a .safetensors file")
    files = [folder / name for name in (WEIGHTS, WEIGHTS_2) if (folder / name).is_file()]
    others = [file for file in sorted(folder.glob("*.safetensors")) if file not in files]
    files += [file for file in others if "difftune.component" in _read_header(file)]
    if not files:
        found = ", ".join(file.name for file in others) or "no .safetensors file"
        raise UserError(f"no adapter in {str(folder)!r} (it holds {found}): expected {WEIGHTS}, or name the file")
    return files


def _load_component(pipe: Any, component: str, file: Path, header: Mapping[str, str], adapter_name: str) -> None:
    from safetensors.torch import load_file

    module = _modules(pipe).get(component)
    if module is None:
        raise UserError(f"{file} is for the component {component!r}, which {type(pipe).__name__} does not have")
    tensors = load_file(file)
    if header.get("difftune.kind") == "weights":
        own = dict(module.named_parameters())
        odd = [key for key, value in tensors.items() if key not in own or own[key].shape != value.shape]
        if odd:
            raise UserError(f"{file} does not fit {component}: {odd[0]} is missing there or has another shape")
        with torch.no_grad():
            for key, value in tensors.items():
                own[key].copy_(value)
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    try:
        settings = dict(json.loads(header["lora_adapter_metadata"]))
        if not isinstance(settings.get("target_modules"), list):
            # peft would run a string as a regular expression, and this one comes from somebody's file.
            raise TypeError("target_modules is no list")
        config = LoraConfig(**settings)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file}: the adapter's settings in its header cannot be read ({error})") from error
    try:
        if hasattr(module, "add_adapter"):
            module.add_adapter(config, adapter_name=adapter_name)  # type: ignore[operator]
        else:
            inject_adapter_in_model(config, module, adapter_name=adapter_name)
        result = set_peft_model_state_dict(module, tensors, adapter_name=adapter_name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not fit {component}: {str(error).splitlines()[0]}") from error
    if result is not None and result.unexpected_keys:
        raise UserError(f"{file} does not fit {component}: it has no {result.unexpected_keys[0]}")
    module.to(next(module.parameters()).device)


# Inspecting


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """Describe a LoRA file without loading a model.

    Args:
        path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors``.

    Returns:
        ``file``; ``format`` (``diffusers``, ``kohya``, ``peft``, ``comfy``, ``weights`` or ``unknown``);
        ``family``, a guess from the keys; ``components``; ``layers``, ``tensors`` and ``parameters``
        (counts); ``dtypes``; ``ranks`` (sorted); ``alphas`` (sorted; where the file has none, alpha is the
        rank); ``scales``, the factors alpha / rank that a reader has to apply; ``norm``, the Frobenius norm
        of all updates scale * B A together; ``finite``;
        ``loaders``: for diffusers, ComfyUI and A1111 ``{"matched": layers it will apply, "total": layers,
        "note": why}``, predicted from the rules by which they match keys; ``metadata``, the header.

    Raises:
        UserError: no such file, or not a safetensors file.
    """
    from safetensors.torch import load_file

    source = Path(path)
    file = source if source.is_file() else _adapter_files(source)[0]
    header = _read_header(file)
    tensors = load_file(file)
    pairs = _pairs(tensors)
    layout = _layout(tensors, pairs, header)
    family = _family(tensors, header)
    ranks = {layer: down.shape[0] for layer, (down, _) in pairs.items()}
    alphas = _alphas(tensors, header, ranks, layout)
    scales = {layer: alphas[layer] / ranks[layer] for layer in pairs}
    squares = sum(scales[layer] ** 2 * _square_norm(*pair) for layer, pair in pairs.items())
    return {
        "file": str(file),
        "format": layout,
        "family": family,
        "components": sorted({_component(layer, header) for layer in pairs or tensors}),
        "layers": len(pairs),
        "tensors": len(tensors),
        "parameters": sum(v.numel() for k, v in tensors.items() if not k.endswith(".alpha")),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}),
        "ranks": sorted(set(ranks.values())),
        "alphas": sorted(set(alphas.values())),
        "scales": sorted(set(scales.values())),
        "norm": math.sqrt(squares) if math.isfinite(squares) else squares,
        "finite": all(bool(torch.isfinite(value).all()) for value in tensors.values()),
        "loaders": _loaders(list(pairs), layout, family, alphas, ranks),
        "metadata": header,
    }


_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer -> (A, B) for every complete pair."""
    pairs = {}
    for down, up in zip(_DOWN, _UP, strict=True):
        for key in tensors:
            layer = key.removesuffix(down)
            if layer != key and layer + up in tensors:
                pairs[layer] = (tensors[key], tensors[layer + up])
    return pairs


def _square_norm(down: Tensor, up: Tensor) -> float:
    """Return the squared Frobenius norm of B A without forming it: trace(A A^T B^T B)."""
    a, b = down.double().flatten(1), up.double().flatten(1)
    return float(((a @ a.T) * (b.T @ b)).sum())


def _layout(tensors: Mapping[str, Tensor], pairs: Mapping[str, Any], header: Mapping[str, str]) -> str:
    if header.get("difftune.kind") == "weights":
        return "weights"
    layers = list(pairs)
    if any(layer.startswith(("lora_unet_", "lora_te")) for layer in layers):
        return "kohya"
    if "difftune.component" in header or any(layer.startswith("base_model.model.") for layer in layers):
        return "peft"
    if any(layer.startswith("diffusion_model.") for layer in layers):
        return "comfy"
    known = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
    return "diffusers" if layers and all(layer.startswith(known) for layer in layers) else "unknown"


def _component(layer: str, header: Mapping[str, str]) -> str:
    if "difftune.component" in header:
        return header["difftune.component"]
    kohya = {"lora_unet_": "unet", "lora_te2_": "text_encoder_2", "lora_te": "text_encoder"}
    for prefix, component in kohya.items():
        if layer.startswith(prefix):
            return component
    return layer.split(".")[0]


def _family(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Guess the model family from the keys, or from what a header says."""
    keys = " ".join(tensors)
    if "unet." in keys or "lora_unet_down_blocks" in keys or "lora_unet_input_blocks" in keys:
        named = header.get("ss_base_model_version", header.get("modelspec.architecture", ""))
        if named.startswith(("sdxl", "stable-diffusion-xl")) or "text_encoder_2" in keys or "lora_te2" in keys:
            return "SDXL"
        return "SD 2" if named.startswith(("sd_v2", "stable-diffusion-v2")) else _unet_by_width(tensors)
    if "single_transformer_blocks" in keys or "double_blocks" in keys:
        return "Flux"
    if re.search(r"transformer\.transformer_blocks\.\d+\.attn2?\.add_[qkv]_proj", keys):
        return "SD 3"
    return str(header.get("modelspec.architecture", "unknown")).removesuffix("/lora") or "unknown"


def _unet_by_width(tensors: Mapping[str, Tensor]) -> str:
    """Tell SD 1, SD 2 and SDXL apart by the width of the text features that cross-attention reads."""
    for key, value in tensors.items():
        if re.search(r"attn2[._]to_k[._].*(lora_A|down)", key):
            return {1024: "SD 2", 2048: "SDXL"}.get(value.shape[1], "SD 1")
    return "SD 1"


def _alphas(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], ranks: Mapping[str, int], layout: str
) -> dict[str, float]:
    """Return each layer's alpha: its own tensor, else the stored settings', else the rank."""
    stored: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        stored = dict(json.loads(header.get("lora_adapter_metadata", "{}")))
    alphas = {}
    for layer, rank in ranks.items():
        component, _, path = layer.partition(".") if layout == "diffusers" else ("", "", layer)
        settings = {k.removeprefix(f"{component}."): v for k, v in stored.items()} if component else stored
        alpha = settings.get("lora_alpha", rank)
        # A pattern is the end of a layer's path. peft reads it as a regular expression, which is not safe to run
        # from somebody's file.
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if f".{path}".endswith(f".{pattern.lstrip('^')}"):
                alpha = value
        own = tensors.get(f"{layer}.alpha")
        alphas[layer] = float(own) if own is not None and layout != "diffusers" else float(alpha)
    return alphas


_COMFY_TRANSFORMERS = ("SD 3", "Flux")
_ATTENTION = re.compile(r"\.to_(q|k|v|out\.0)$")


def _loaders(
    layers: list[str], layout: str, family: str, alphas: Mapping[str, float], ranks: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Predict how many layers each program applies, by the rules with which it matches keys."""
    total = len(layers)
    kohya_only = (0, "reads kohya's layout only")
    if layout == "kohya":
        return _loader_table(total, diffusers=(total, ""), ComfyUI=(total, ""), A1111=(total, ""))
    if layout == "diffusers":
        comfy = _comfy_on_diffusers(layers, family, all(alphas[layer] == ranks[layer] for layer in layers))
        return _loader_table(total, diffusers=(total, ""), ComfyUI=comfy, A1111=kohya_only)
    if layout == "comfy":
        return _loader_table(total, diffusers=(0, "depends on the family"), ComfyUI=(total, ""), A1111=kohya_only)
    why = "difftune.export.load_adapter loads it" if layout in ("peft", "weights") else "unknown layout"
    return _loader_table(total, diffusers=(0, why), ComfyUI=(0, why), A1111=(0, why))


def _comfy_on_diffusers(layers: list[str], family: str, folded: bool) -> tuple[int, str]:
    """Return how many layers of a diffusers file ComfyUI applies, and what is to be said of it."""
    lost = [layer for layer in layers if layer.startswith("unet.") and _ATTENTION.search(layer)]
    notes = ["attention keys of a UNet need the kohya file"] if lost else []
    if any(layer.startswith("transformer.") for layer in layers) and family not in _COMFY_TRANSFORMERS:
        notes.append("if it knows the model family")
    if not folded:
        notes.append("at the wrong strength, because alpha is not in the tensors")
    return len(layers) - len(lost), "; ".join(notes)


def _loader_table(total: int, **programs: tuple[int, str]) -> dict[str, dict[str, Any]]:
    return {name: {"matched": hits, "total": total, "note": note} for name, (hits, note) in programs.items()}


# The model card


def _card(
    pipe: Any,
    adapters: list[_Adapter],
    files: list[str],
    own_layout: list[Any],
    config: Mapping[str, Any],
    header: Mapping[str, str],
    base_model: str,
    name: str,
    figures: Mapping[str, Mapping[str, float]] | None,
) -> str:
    """Return the model card: Markdown with the front matter that model hubs read.

    JSON strings are valid YAML, and code spans and fences longer than any run of backticks inside keep what
    users wrote (prompts, names) from becoming markup.
    """
    kind = "LoRA" if adapters else "set of trained weights"
    facts = [("Base model", base_model or "not named"), ("Pipeline", type(pipe).__name__)]
    facts += [(title, _brief(config[key])) for key, title in _CARD_ROWS.items() if config.get(key) is not None]
    for adapter in adapters:
        ranks = sorted({v.shape[0] for k, v in adapter.tensors.items() if k.endswith("lora_A.weight")})
        layers = sum(key.endswith("lora_A.weight") for key in adapter.tensors)
        facts.append((f"Adapter on {adapter.component}", f"rank {', '.join(map(str, ranks))}, {layers} layers"))
    facts += [("Trained with", f"difftune {header['difftune.version']}")]
    tags = ["difftune", *(["lora"] if adapters else []), "reward-finetuning"]
    blocks = [
        "---",
        *([f"base_model: {json.dumps(base_model)}"] if base_model else []),
        "library_name: diffusers",
        f"tags: {json.dumps(tags)}",
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind} for {_code(base_model or 'the base model')}, fine-tuned with rewards.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {_code(value)} |" for title, value in facts),
        "",
        *_figure_rows(figures),
        "## Use",
        "",
        *_usage(pipe, files, own_layout, base_model, bool(adapters)),
        "## Files",
        "",
        *(f"- {_code(file)}: {_describe(file)}" for file in files),
        "",
        "## Configuration",
        "",
        _fence(json.dumps(config, indent=2, sort_keys=True, default=str), "json"),
        "",
    ]
    return "\n".join(blocks)


_CARD_ROWS = {"algorithm": "Algorithm", "reward": "Reward", "prompts": "Prompts"}
"""Configuration keys that the card's table shows, with their titles."""


def _brief(value: Any, limit: int = 160) -> str:
    """Say a setting in one line: a name with its settings, a list by its first entries."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _code(text: str) -> str:
    """Return ``text`` as a Markdown code span that fits into a table cell."""
    flat = " ".join(str(text).split()).replace("|", "¦")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{pad}{flat or ' '}{pad}{ticks}"


def _fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _figure_rows(figures: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    if not figures:
        return []
    columns = list(figures)
    names = list(dict.fromkeys(key for column in columns for key in figures[column]))
    rows = [f"| | {' | '.join(_code(column) for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in names:
        cells = [f"{figures[c][key]:.4g}" if key in figures[c] else "" for c in columns]
        rows.append(f"| {_code(key)} | {' | '.join(cells)} |")
    return ["## Figures", "", *rows, ""]


def _usage(pipe: Any, files: list[str], own_layout: list[Any], base_model: str, lora: bool) -> list[str]:
    """Return how to load the files: by stock diffusers where it can, and why not where it cannot."""
    base = json.dumps(base_model or "path/to/the/base/model")
    # The embedded models are no hub ids: their folder has to be asked for.
    loaded = f"difftune.load_pipeline({base})" if base_model.startswith("difftune/") else None
    lines = ["import difftune" if loaded else "from diffusers import DiffusionPipeline", ""]
    lines.append(f"pipe = {loaded or f'DiffusionPipeline.from_pretrained({base})'}")
    if WEIGHTS in files:
        lines.append(f'pipe.load_lora_weights("path/to/this/folder", weight_name="{WEIGHTS}")')
    if WEIGHTS_2 in files:
        lines.append(
            f'pipe.load_lora_weights("path/to/this/folder", weight_name="{WEIGHTS_2}", load_into_transformer_2=True)'
        )
    text = []
    if own_layout:
        lines = ["from difftune.export import load_adapter", *lines, 'load_adapter(pipe, "path/to/this/folder")']
        what = "loads no LoRA of this kind" if lora else "does not load single trained parameters"
        text = [f"{_code(type(pipe).__name__)} {what} by itself, so difftune puts the files back:", ""]
    strength = "The strength (alpha / rank) is part of the weights: load at scale 1." if lora else ""
    return [*text, _fence("\n".join(lines), "python"), "", *([strength, ""] if strength else [])]


def _describe(file: str) -> str:
    if file in (WEIGHTS, WEIGHTS_2):
        return "diffusers" + (" (second expert)" if file == WEIGHTS_2 else "")
    return "ComfyUI and A1111" if file.endswith("_kohya.safetensors") else "one component, for difftune"
