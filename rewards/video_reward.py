"""VideoReward: a film's visual quality, motion quality and agreement with the prompt, by a Qwen2-VL with a head.

Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv 2501.13918). The instruction ends each of three
sections in a token; a linear head without bias reads the last hidden states h there, and the scores are standardised::

    r_d = (w_d . h_d - mean_d) / std_d,  d in VQ, MQ, TA        r = r_VQ + r_MQ + r_TA

The published folder holds ``model_config.json`` (frame rate, pixels, LoRA, means and deviations) and a
``checkpoint-N`` with the weights, either whole (``model.pth``) or apart (``adapter_model.safetensors`` and
``non_lora_state_dict.pth``, on top of the base model's). A LoRA is merged on loading: ``W + alpha / r B A``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftune.reward import Reward, reward
from difftune.rewards._clip import embedded
from difftune.rewards._vlm import Judge, moved
from difftune.rewards._weights import load_state
from difftune.types import RewardOutput, UserError

DIMENSIONS = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment: the order of the head's rows and of the tokens."""

TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
"""Where the hidden states are read."""

LEAST_FRAME_PIXELS = 128 * 28 * 28
"""Frames below this are enlarged, as Qwen's own video code does."""

FEWEST_FRAMES, MOST_FRAMES = 4, 768
"""How many frames are looked at: of a film that has them, at least and at most."""


@reward("video_reward")
class VideoReward(Reward):
    """VideoReward: a film's visual quality, motion quality and text alignment, summed; the parts tell them apart.

    Args:
        instruction: what the model is told, as published with the weights (``detailed_special``): it holds the tokens
            of the three dimensions, in their order; ``{text_prompt}`` becomes the prompt.
        weights: the published folder, with ``model_config.json`` and ``checkpoint-*``.
        model: folder or hub id of the base model.
        frame_rate: frames per second of the films that are scored.
        revision: branch, tag or commit of the base model.
        dtype: precision of the model; the head is fp32.
    """

    differentiable = True
    video = True
    range = "unbounded, about -6 to 6: three standardised scores"
    weights = "hub: KwaiVGI/VideoReward, on Qwen/Qwen2-VL-2B-Instruct"
    licence = "MIT (VideoAlign), Apache-2.0 (Qwen2-VL)"
    memory = "4.1 GiB in bf16"

    def __init__(
        self,
        instruction: str,
        weights: str,
        model: str = "Qwen/Qwen2-VL-2B-Instruct",
        frame_rate: float = 16.0,
        revision: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if "{text_prompt}" not in instruction:
            raise UserError(f"reward {self.name!r}: the instruction has no {{text_prompt}}, where the prompt goes")
        if tuple(re.findall("|".join(map(re.escape, TOKENS)), instruction)) != TOKENS:
            raise UserError(
                f"reward {self.name!r}: the instruction must hold {', '.join(TOKENS)}, each once and in this order"
            )
        folder = Path(weights).expanduser()
        config = read_config(self.name, folder)
        state = merged(self.name, checkpoint_state(self.name, folder, model, revision), config["peft_lora_config"])
        self.judge = Judge(self.name, model, revision, dtype, _without_head(self.name, state), TOKENS)
        rows, columns = state["rm_head.weight"].shape
        self.head = nn.Linear(columns, rows, bias=False).eval().requires_grad_(False)
        self.head.weight.copy_(state["rm_head.weight"].float())
        data = config["data_config"]
        self.judge.resize_to(int(data["max_frame_pixels"]), min(LEAST_FRAME_PIXELS, int(data["max_frame_pixels"])))
        self.per_second, self.frames = float(data.get("fps") or 2.0), data.get("num_frames")
        self.instruction, self.frame_rate = instruction, frame_rate
        known = config.get("inference_config") or {}
        self.scales = [(known.get(f"{d}_mean", 0.0), known.get(f"{d}_std", 1.0)) for d in DIMENSIONS]

    def modules(self) -> list[nn.Module]:
        """Return the model and the head."""
        return [self.judge.model, self.head]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return the sum ``(B,)`` and the parts vq, mq, ta; a picture is scored as a film of one frame."""
        films = images if images.ndim == 5 else images[:, None]
        shown = films[:, chosen_frames(films.shape[1], self.frame_rate, self.per_second, self.frames)]
        rows = []
        for film, prompt in zip(shown, prompts, strict=True):
            told = self.instruction.replace("{text_prompt}", self.judge.plain(prompt))
            answers = self.head(self.judge.hidden_states([film], told, TOKENS))
            rows.append(answers.diagonal() if answers.shape[1] == len(TOKENS) else answers[:, 0])
        scores = torch.stack(rows).to(images.device)
        means, deviations = (scores.new_tensor(values) for values in zip(*self.scales, strict=True))
        scores = (scores - means) / deviations
        return RewardOutput(scores.sum(1), dict(zip(("vq", "mq", "ta"), scores.unbind(1), strict=True)))


def chosen_frames(frames: int, frame_rate: float, per_second: float, count: int | None = None) -> list[int]:
    """Return the frames that are looked at, evenly from the first to the last, an even number where there are so many.

    Args:
        frames: how many the film has.
        frame_rate: how many of them make a second.
        per_second: how many are looked at per second, at least :data:`FEWEST_FRAMES` in all.
        count: how many are looked at in all, in place of ``per_second``.
    """
    if count is None:
        most = min(MOST_FRAMES, frames) // 2 * 2
        count = min(max(frames / frame_rate * per_second, FEWEST_FRAMES), most)  # type: ignore[assignment]
    assert count is not None
    number = max(1, min(round(count / 2) * 2, frames))
    return torch.linspace(0, frames - 1, number).round().long().tolist()


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """Return the published ``model_config.json``.

    Raises:
        UserError: there is none, or it is another's.
    """
    file = folder / "model_config.json"
    try:
        config = json.loads(file.read_text())
        config["data_config"]["max_frame_pixels"], config["peft_lora_config"]["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"reward {name!r}: {folder} has no usable model_config.json ({type(error).__name__} {error}); download the "
            "published folder and name it as weights"
        ) from None
    return config


def checkpoint_state(name: str, folder: Path, model: str, revision: str | None) -> dict[str, Tensor]:
    """Return the weights of the newest checkpoint, as they are stored, over the base model's where they are partial.

    Raises:
        UserError: there is no checkpoint, or it is incomplete.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    if not found:
        raise UserError(f"reward {name!r}: {folder} has no checkpoint-*; download the published folder whole")
    if (found[-1] / "model.pth").is_file():
        return load_state(name, found[-1] / "model.pth")
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(embedded(name, model), revision=revision or "main")
    own = load_state(name, found[-1] / "non_lora_state_dict.pth")
    return {**base.state_dict(), **own, **load_state(name, found[-1] / "adapter_model.safetensors")}


def merged(name: str, state: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights without what PEFT puts around them: each adapter is added to its matrix.

    Args:
        name: the reward, for messages.
        state: weights by the names that PEFT gives them, of transformers 4.45 or later.
        lora: ``lora_alpha``, and ``use_rslora`` where the scale is alpha over the rank's square root.

    Raises:
        UserError: an adapter is not one of a matrix, or has none.
    """
    plain: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for stored, value in state.items():
        key = moved(stored.removeprefix("base_model.model.").replace(".base_layer.", "."))
        adapter = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", key)
        if adapter is not None:
            adapters.setdefault(adapter[1] + ".weight", {})[adapter[2]] = value
        elif ".lora_" in key:
            raise UserError(f"reward {name!r}: {stored} is no adapter of a matrix, and others are not supported")
        elif ".original_module." not in key:
            plain[key.replace(".modules_to_save.default.", ".")] = value
    for key, pair in adapters.items():
        if key not in plain or set(pair) != {"A", "B"}:
            raise UserError(f"reward {name!r}: the adapter of {key} is incomplete, or there is no such matrix")
        rank = len(pair["A"])
        scale = lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank)
        change = scale * (pair["B"].float() @ pair["A"].float())
        plain[key] = (plain[key].float() + change).to(plain[key].dtype)
    return plain


def _without_head(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    head = state.get("rm_head.weight")
    if head is None or head.ndim != 2 or len(head) not in (1, len(DIMENSIONS)):
        raise UserError(f"reward {name!r}: the checkpoint has no rm_head with one row or three")
    return {key: value for key, value in state.items() if key != "rm_head.weight"}
