"""Tiny random instances of many pipeline classes of diffusers, built from configs: the rows of the matrix test.

Nothing comes from a hub; text encoders are real transformers classes of a few thousand parameters and tokenizers are
built here, one token per character. A :class:`Case` says how to make the pipeline and what to call it with: what a user
would write, and nothing about how it is trained.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers as df
import numpy as np
import tiny
import torch
import transformers as tf
from PIL import Image
from torch import nn

PROMPTS = ["a red cat", "two dog"]


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Attributes:
        build: makes the pipeline.
        family: the row's family, by which lines of quirk data are counted.
        call: fixed arguments of the call.
        conditions: per-sample arguments for a number of samples.
        steps: denoising steps.
        batch: samples per rollout.
        fast: whether the row belongs to the fast tests.
        refused: what the sampler says where the class cannot be trained.
    """

    build: Callable[[], Any]
    family: str
    call: Mapping[str, Any] = field(default_factory=dict)
    conditions: Callable[[int], dict[str, Any]] = lambda count: {}
    steps: int = 4
    batch: int = 2
    fast: bool = False
    refused: str = ""


CASES: dict[str, Case] = {}


def case(name: str, family: str, **settings: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the builder below as the row ``name``: a class name, with a variant in brackets if there are several."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        CASES[name] = Case(build=build, family=family, **settings)
        return build

    return register


def exported() -> list[str]:
    """The names of the pipeline classes that diffusers exports, but for those of other runtimes and interfaces.

    Left out are ONNX pipelines, modular pipelines (another interface) and base classes.
    """
    names = [name for name in dir(df) if "Pipeline" in name and "Output" not in name and "Blocks" not in name]
    others = ("Onnx", "StableDiffusionOnnx", "DiffusionPipeline", "ModularPipeline", "PipelineQuantization", "Flax")
    return [name for name in names if not name.startswith(others) and not name.endswith("ModularPipeline")]


def pictures(count: int, size: int = 16, mode: str = "RGB") -> list[Image.Image]:
    """Different random pictures."""
    rng = np.random.default_rng(0)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode) for _ in range(count)]


def masks(count: int, size: int = 16) -> list[Image.Image]:
    """Masks whose right half is to be painted."""
    array = np.zeros((size, size), np.uint8)
    array[:, size // 2 :] = 255
    return [Image.fromarray(array, "L")] * count


def given(name: str = "image", size: int = 16, **more: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    """A picture per sample as the argument ``name``, and whatever else."""
    return lambda count: {name: pictures(count, size), **{key: make(count) for key, make in more.items()}}


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give the parameters that carry nothing before training small values, so that gradients flow.

    Zeros carry nothing, and neither does what diffusers leaves uninitialised (LuminaNextDiT2DModel's ``pad_token`` is
    ``torch.empty``: zeros in one process and 1e33 in the next). Each parameter has a seed of its own, so that one
    that happens to be filled does not change the others.
    """
    for index, parameter in enumerate(module.parameters()):
        size = parameter.detach().abs().max() if parameter.numel() else torch.zeros(())
        if not 1e-12 < size < 1e6:
            generator = torch.Generator().manual_seed(seed + index)
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def make(cls: Any, **config: Any) -> Any:
    """A model of ``cls`` with random weights, the same every time."""
    torch.manual_seed(0)
    # What a class leaves uninitialised is NaN then, which `alive` finds, in place of whatever lay in memory.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = cls(**config)
    finally:
        torch.use_deterministic_algorithms(False)
    return alive(model)


def letters(length: int = 16, padding: str = "right", cls: Any = tf.PreTrainedTokenizerFast) -> Any:
    """A tokenizer of one token per character, with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocab = ["<pad>", "</s>", "<unk>", "<s>", "<|im_end|>", *(chr(c) for c in range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tok = cls(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
        padding_side=padding,
    )
    tok.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    return tok


VOCAB = 128


def t5(width: int = 16, cls: Any = tf.T5EncoderModel, config: Any = tf.T5Config) -> Any:
    return make(
        cls,
        config=config(vocab_size=VOCAB, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0),
    )


def clip(projection: bool = False, width: int = 16, length: int = 8) -> Any:
    cls = tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel
    return make(cls, config=tiny._text_config(len(tiny.tokenizer()), width, length))


def language(cls: str, config: str, width: int = 16, layers: int = 3, **more: Any) -> Any:
    """A tiny decoder-only language model."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        **more,
    }
    return make(getattr(tf, cls), config=getattr(tf, config)(**settings))


def kl(channels: int = 4, **config: Any) -> Any:
    return alive(tiny.vae(channels, **config))


DDIM = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def ddim(**config: Any) -> Any:
    return df.DDIMScheduler(**{**DDIM, **config})


def flow(**config: Any) -> Any:
    return df.FlowMatchEulerDiscreteScheduler(**config)


def assemble(cls: Any, **parts: Any) -> Any:
    """A pipeline of ``cls`` from those of ``parts`` that its constructor takes; whatever else it wants is ``None``."""
    wanted = {
        name: parameter
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    chosen = {
        name: parts.get(name)
        for name, parameter in wanted.items()
        if name in parts or parameter.default is inspect.Parameter.empty
    }
    pipe = cls(**chosen)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIZE = {"height": 16, "width": 16}


SHORT = {"max_sequence_length": 8}


TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "dog"}


def unet(channels: int = 4, **config: Any) -> Any:
    return make(
        df.UNet2DConditionModel,
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            **config,
        },
    )


def control(**config: Any) -> Any:
    return make(
        df.ControlNetModel,
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "conditioning_embedding_out_channels": (4, 8),
            **config,
        },
    )


def adapter() -> Any:
    return make(
        df.T2IAdapter,
        in_channels=3,
        channels=[8, 16],
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type="full_adapter",
    )


def vision(width: int = 16) -> Any:
    config = tf.CLIPVisionConfig(
        hidden_size=width,
        image_size=32,
        projection_dim=width,
        intermediate_size=32,
        num_attention_heads=2,
        num_channels=3,
        num_hidden_layers=2,
        patch_size=16,
    )
    return make(tf.CLIPVisionModelWithProjection, config=config)


def image_processor() -> Any:
    return tf.CLIPImageProcessor(crop_size=32, size=32)


INPAINT = given(mask_image=masks)


def without_ftfy(cls: Any) -> None:
    """Let a pipeline that cleans prompts by ftfy, without asking whether it is installed, do without."""
    vars(sys.modules[cls.__module__]).setdefault("ftfy", SimpleNamespace(fix_text=lambda text: text))


def without_torchvision(cls: Any) -> None:
    """Let a model that resizes a mask by torchvision, to the nearest pixels, do without."""
    functional = SimpleNamespace(resize=lambda mask, size, interpolation: nn.functional.interpolate(mask, size))
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    vars(sys.modules[cls.__module__]).setdefault("transforms", transforms)
