"""What the suites of the rewards share: small random weights in the original formats, and how to build each reward.

The reference models are written after the published architectures, with torch's own layers and the original names of
the tensors, so that ``state_dict()`` is a file of the original format and ``forward`` what the original computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftune.reward import Reward, build_reward
from difftune.types import RewardOutput

TOKENIZER = "difftune/tiny-clip"


def randomised(module: nn.Module, seed: int, std: float = 0.15) -> nn.Module:
    """Give every parameter random values: norms near 1, all else around 0, so that no term vanishes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            scale = value if "ln_" in name or "norm" in name else torch.zeros_like(value)
            if name.endswith("logit_scale"):
                continue
            value.copy_(scale + std * noise)
    return module.eval().requires_grad_(False)


# OpenCLIP


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 3 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(3 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Blocks(nn.Module):
    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, image: int, patch: int, dims: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Blocks(width, heads, depth)
        self.proj = nn.Parameter(torch.zeros(width, dims))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """OpenCLIP's two towers with its names: vision 128 wide (2 heads), text 64 wide (1 head), 32 dimensions."""

    def __init__(self, image: int = 64, context: int = 16, vocabulary: int = 607) -> None:
        super().__init__()
        self.visual = _Visual(128, 2, 2, image, 16, 32)
        self.transformer = _Blocks(64, 1, 2)
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.positional_embedding = nn.Parameter(torch.zeros(context, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.zeros(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed ``(B, L)`` tokens, pooled at the highest token, which is the end of the text."""
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=self.text_projection.dtype).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection

    def cosines(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Return the cosine of each picture and text."""
        return torch.cosine_similarity(self.visual(pixels), self.encode_text(tokens))


def open_clip(seed: int = 0, **geometry: int) -> OpenClip:
    """Return a random one."""
    model = randomised(OpenClip(**geometry), seed)
    assert isinstance(model, OpenClip)
    return model


def tokens_of(prompts: Sequence[str], length: int = 16) -> Tensor:
    """Return ``(B, L)`` tokens as OpenCLIP pads them: zeros after the end of the text."""
    from transformers import CLIPTokenizer

    from difftune.zoo import model_path

    tokenizer = CLIPTokenizer.from_pretrained(model_path(TOKENIZER))
    out = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in zip(out, prompts, strict=True):
        ids = tokenizer(prompt, truncation=True, max_length=length).input_ids
        row[: len(ids)] = torch.tensor(ids)
    return out


def hps_file(folder: Path) -> dict[str, Any]:
    """Write a checkpoint as HPS is published."""
    torch.save({"epoch": 1, "state_dict": open_clip().state_dict()}, folder / "HPS_v2_compressed.pt")
    return {"model": str(folder / "HPS_v2_compressed.pt"), "tokenizer": TOKENIZER}


def clip_file(folder: Path) -> dict[str, Any]:
    """Write a bare OpenCLIP state dict."""
    torch.save(open_clip().state_dict(), folder / "clip.pt")
    return {"model": str(folder / "clip.pt"), "tokenizer": TOKENIZER}


# Aesthetic heads


def linear_head(width: int, numbers: Sequence[int] = (0, 2, 4, 6, 7), prefix: str = "layers", seed: int = 0) -> dict:
    """Return the state dict of a head: layers of falling width, numbered as in the original ``nn.Sequential``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, 24, 12, 8, 6, 1]
    state = {}
    for number, rows, columns in zip(numbers, sizes[1:], sizes, strict=False):
        state[f"{prefix}.{number}.weight"] = torch.randn(rows, columns, generator=generator) * 0.5
        state[f"{prefix}.{number}.bias"] = torch.randn(rows, generator=generator) * 0.5
    return state


def aesthetic_file(folder: Path) -> dict[str, Any]:
    """Write a head for the embedded CLIP's 64 numbers."""
    torch.save(linear_head(64), folder / "head.pth")
    return {"head": str(folder / "head.pth"), "model": "difftune/tiny-clip"}


def siglip_folder(folder: Path) -> dict[str, Any]:
    """Write a SigLIP vision tower and a head in bf16, as v2.5's is published."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    torch.manual_seed(0)
    model = randomised(SiglipVisionModel(config), 0)
    model.save_pretrained(folder / "siglip")  # type: ignore[operator]
    SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder / "siglip")
    state = linear_head(32, (0, 2, 4, 6, 8), "scoring_head")
    torch.save({key: value.bfloat16() for key, value in state.items()}, folder / "v25.pth")
    return {"head": str(folder / "v25.pth"), "model": str(folder / "siglip")}


# PAL


def pal_state(model: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the state dict of a PAL model ``a`` or ``b`` on 64 features, with two groups and two users."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def projector(prefix: str) -> dict[str, Tensor]:
        # Linear, Dropout, ReLU, Linear
        return {
            f"{prefix}.layers.0.weight": rand(20, 64),
            f"{prefix}.layers.0.bias": rand(20),
            f"{prefix}.layers.3.weight": rand(16, 20),
            f"{prefix}.layers.3.bias": rand(16),
        }

    state = {"logit_scale": torch.tensor(2.0), **projector("item_learner.projector")}
    state |= {"user_learner.W.ann": rand(2) * 5, "user_learner.W.bob": rand(2) * 5}
    if model == "a":
        return {**state, "user_learner.P": rand(2, 16)}
    return {**state, **projector("user_learner.projectors.0"), **projector("user_learner.projectors.1")}


def pal_file(folder: Path) -> dict[str, Any]:
    """Write a PAL model B for the embedded CLIP."""
    torch.save(pal_state("b"), folder / "pal.pt")
    return {"head": str(folder / "pal.pt"), "model": "difftune/tiny-clip"}


# How each reward of the registry is built in the common suite


@dataclass
class Case:
    """What a reward needs beyond its defaults.

    Attributes:
        settings: writes what is needed into a folder and returns the settings.
        metadata: prompt to the sample's metadata.
        module: an optional package without which the reward cannot be built.
    """

    settings: Callable[[Path], dict[str, Any]] = lambda folder: {}
    metadata: Callable[[str], dict[str, Any]] = lambda prompt: {}
    module: str | None = None


CASES: dict[str, Case] = {
    "pickscore": Case(clip_file),
    "hpsv2": Case(hps_file),
    "hpsv2_1": Case(hps_file),
    "social_reward": Case(lambda folder: {**clip_file(folder), "activation": "gelu"}),
    "aesthetic": Case(aesthetic_file),
    "aesthetic_v25": Case(siglip_folder),
    "pal": Case(pal_file),
}


class Subject:
    """A built reward that is given the metadata it needs with every call."""

    def __init__(self, name: str, settings: Mapping[str, Any], case: Case) -> None:
        self.name, self.settings, self.case = name, settings, case
        self.reward: Reward = build_reward(name, **settings)

    def __call__(self, images: Any, prompts: Sequence[str]) -> RewardOutput:
        """Score, with each prompt's metadata."""
        return self.reward(images, prompts, self.metadata(prompts))

    def metadata(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Return each prompt's metadata."""
        return [self.case.metadata(prompt) for prompt in prompts]

    def fresh(self) -> Subject:
        """Return the same reward, built again."""
        return Subject(self.name, self.settings, self.case)
