"""Memory and time of scorers at the size of their published weights, which are random here: run it as a program.

    python tests/full_size_rewards.py [NAME ...] [--threads 1] [--computed]

Each scorer is written into a temporary folder by one process and measured by another: parameters, the most memory that
the process held, and the processor's seconds per picture of 512 x 512 pixels, after a first call. With ``--computed``,
and for the largest, the weights are only counted, and what they alone take is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from difftune.reward import build_reward
from difftune.rewards.geneval import Found
from difftune.zoo import model_path

COUNTED: list[tuple[int, int]] = []
"""Numbers and bytes of the weights that were asked for while :data:`COUNTING`."""

COUNTING: list[bool] = []
"""Not empty where weights are to be counted and not written."""


def filled(shapes: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return small numbers in the shapes of a state dict: the same few thousand, over and over, which is quick."""
    numbers = {key: value.numel() for key, value in shapes.items()}
    if COUNTING:
        COUNTED.append((sum(numbers.values()), dtype.itemsize * sum(numbers.values())))
        return {}
    few = 0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {key: few.repeat(size // 4096 + 1)[:size].view(shapes[key].shape) for key, size in numbers.items()}


def saved(folder: Path, kind: Any, config: Any, dtype: torch.dtype = torch.float32) -> str:
    """Write a network of this class in transformers' layout, and return its folder."""
    from safetensors.torch import save_file

    with torch.device("meta"):
        network = kind(config)
    state = network.state_dict()
    for key in getattr(network, "_tied_weights_keys", None) or ():
        if config.tie_word_embeddings:
            state.pop(key, None)
    folder.mkdir(exist_ok=True)
    config.architectures, config.dtype = [kind.__name__], dtype
    config.save_pretrained(folder)
    save_file(filled(state, dtype), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def clip(folder: Path, width: int, layers: int, text: int, text_layers: int, dims: int) -> dict[str, Any]:
    """Write a CLIP of patches of 14, its preprocessing and a tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision = {**sizes, "num_attention_heads": width // (80 if width == 1280 else 64), "image_size": 224}
    words = {"hidden_size": text, "intermediate_size": 4 * text, "num_hidden_layers": text_layers}
    config = CLIPConfig(
        vision_config={**vision, "patch_size": 14, "projection_dim": dims},
        text_config={**words, "num_attention_heads": text // 64, "projection_dim": dims},
        projection_dim=dims,
    )
    CLIPImageProcessor().save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(model_path("difftune/tiny-clip")).save_pretrained(folder / "clip")
    return {"model": saved(folder / "clip", CLIPModel, config)}


def large(folder: Path) -> dict[str, Any]:
    """Write OpenAI's ViT-L/14."""
    return clip(folder, 1024, 24, 768, 12, 768)


def huge(folder: Path) -> dict[str, Any]:
    """Write OpenCLIP's ViT-H/14."""
    return {**clip(folder, 1280, 32, 1024, 24, 1024), "tokenizer": str(folder / "clip")}


def head(width: int, numbers: tuple[int, ...], prefix: str) -> dict[str, torch.Tensor]:
    """Return an aesthetic head's weights."""
    sizes = (width, 1024, 128, 64, 16, 1)
    state: dict[str, torch.Tensor] = {}
    for number, rows, columns in zip(numbers, sizes[1:], sizes, strict=False):
        state |= {f"{prefix}.{number}.weight": torch.empty(rows, columns), f"{prefix}.{number}.bias": torch.empty(rows)}
    return filled(state)


def aesthetic(folder: Path) -> dict[str, Any]:
    """Write ViT-L/14 and LAION's head."""
    torch.save(head(768, (0, 2, 4, 6, 7), "layers"), folder / "head.pth")
    return {**large(folder), "head": str(folder / "head.pth")}


def siglip(folder: Path) -> dict[str, Any]:
    """Write SigLIP so400m at 384 pixels and the head of v2.5."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    SiglipImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder / "siglip")
    torch.save(head(1152, (0, 2, 4, 6, 8), "scoring_head"), folder / "head.pth")
    return {"model": saved(folder / "siglip", SiglipVisionModel, config), "head": str(folder / "head.pth")}


def detector(folder: Path) -> dict[str, Any]:
    """Write YOLOS-base and ViT-L/14."""
    from transformers import YolosConfig, YolosForObjectDetection

    labels = {index: ("cup" if index == 0 else f"kind{index}") for index in range(91)}
    config = YolosConfig(image_size=[800, 1344], id2label=labels)
    found = saved(folder / "yolos", YolosForObjectDetection, config)
    return {**large(folder), "tokenizer": str(folder / "clip"), "detector": found}


def hps(folder: Path) -> dict[str, Any]:
    """Write a ViT-H/14 as HPS v2.1 is published, and a tokenizer."""
    from reward_makers import OpenClip

    with torch.device("meta"):
        network = OpenClip(224, 14, (1280, 16, 32), (1024, 16, 24), 1024, 77, 49408, ratio=4)
    torch.save({"state_dict": filled(network.state_dict())}, folder / "HPS_v2.1_compressed.pt")
    return {"model": str(folder / "HPS_v2.1_compressed.pt"), "tokenizer": str(model_path("difftune/tiny-clip"))}


def image_reward(folder: Path) -> dict[str, Any]:
    """Write BLIP-large (ViT-L/16 at 224 pixels, BERT-base) and the head, as ImageReward is published."""
    from reward_makers import image_reward_file, image_reward_state

    settings = image_reward_file(folder)
    sizes: dict[str, Any] = {
        "width": 1024,
        "text": 768,
        "layers": (24, 12),
        "inner": (4096, 3072),
        "places": (197, 512),
    }
    state = image_reward_state(**sizes, words=30524)
    state = {key: value for key, value in state.items() if not key.startswith("mlp.")}
    config = {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "encoder_width": 1024}
    (folder / "med_config.json").write_text(json.dumps(config))
    torch.save({**filled(state), **head(768, (0, 2, 4, 6, 7), "mlp.layers")}, settings["model"])
    return settings


def qwen_config(width: int, inner: int, heads: int, groups: int, words: int, tied: bool) -> Any:
    """Return the configuration of a Qwen2-VL, whose vision tower is always the same."""
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": words,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"hidden_size": width},
        image_token_id=2,
        video_token_id=298,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=tied,
    )


def qwen(folder: Path) -> dict[str, Any]:
    """Write Qwen2-VL-2B, in bf16."""
    from reward_makers import byte_tokenizer
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    byte_tokenizer(folder / "qwen")
    config = qwen_config(1536, 8960, 12, 2, 151936, True)
    Qwen2VLImageProcessor().save_pretrained(folder / "qwen")
    model = saved(folder / "qwen", Qwen2VLForConditionalGeneration, config, torch.bfloat16)
    return {"model": model, "dtype": "bfloat16"}


def hpsv3(folder: Path) -> dict[str, Any]:
    """Lay out Qwen2-VL-7B, in bf16, and the head of three layers."""
    from transformers import Qwen2VLForConditionalGeneration

    saved(
        folder / "qwen", Qwen2VLForConditionalGeneration, qwen_config(3584, 18944, 28, 4, 152064, False), torch.bfloat16
    )
    filled({f"{rows}": torch.empty(rows, columns + 1) for rows, columns in ((1024, 3584), (16, 1024), (2, 16))})
    return {}


def video_reward(folder: Path) -> dict[str, Any]:
    """Write Qwen2-VL-2B, in bf16, and the published folder: all weights in one file, the head without bias."""
    from reward_makers import RATED, as_in_4_45
    from safetensors.torch import load_file

    settings = qwen(folder)
    head = filled({"rm_head.weight": torch.empty(3, 1536)})
    if COUNTING:
        return settings
    state = {as_in_4_45(key): value for key, value in load_file(folder / "qwen" / "model.safetensors").items()}
    (folder / "VideoReward" / "checkpoint-1").mkdir(parents=True)
    prefixed = {f"base_model.model.{key}": value for key, value in {**state, **head}.items()}
    torch.save(prefixed, folder / "VideoReward" / "checkpoint-1" / "model.pth")
    config = {"data_config": {"fps": 2.0, "max_frame_pixels": 448 * 448}, "peft_lora_config": {"lora_alpha": 128}}
    (folder / "VideoReward" / "model_config.json").write_text(json.dumps(config))
    return {**settings, "instruction": RATED, "weights": str(folder / "VideoReward")}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "clip_score": large,
    "pickscore": huge,
    "hpsv2_1": hps,
    "image_reward": image_reward,
    "aesthetic": aesthetic,
    "aesthetic_v25": siglip,
    "geneval": detector,
    "vqa_score": qwen,
    "reward_dance": qwen,
    "video_reward": video_reward,
    "nsfw": lambda folder: {},
    "ocr": lambda folder: {},
}


TOO_LARGE: dict[str, Callable[[Path], dict[str, Any]]] = {"hpsv3": hpsv3}
"""Scorers whose weights are counted and not measured."""


def measure(name: str, folder: Path) -> dict[str, float]:
    """Return parameters, GiB at the peak, and the processor's seconds per picture."""
    scorer: Any = build_reward(name, **json.loads((folder / "settings.json").read_text()))
    images = torch.rand(3, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    prompts = ['two cups that say "tea"'] * 3
    Image.new("RGB", (512, 512)).save(folder / "reference.png")
    metadata = [{"include": [{"class": "cup"}], "reference": str(folder / "reference.png")}] * 3

    def score(rows: slice) -> None:
        scorer(images[rows], prompts[rows], metadata[rows])
        if name == "geneval":
            # Random weights find no cup: CLIP is asked for the colour of one in each picture.
            for image in images[rows]:
                scorer.colour(image, Found(1.0, (64.0, 64.0, 320.0, 320.0)), "cup")

    with torch.no_grad():
        score(slice(0, 1))
        started = time.process_time()
        score(slice(1, None))
    seconds = (time.process_time() - started) / 2
    parameters = sum(p.numel() for module in scorer.modules() for p in module.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"million": parameters / 1e6, "gib": peak, "seconds": seconds}


def computed(name: str) -> tuple[float, float]:
    """Return parameters and GiB of a scorer's weights, which are laid out and not written."""
    COUNTED.clear()
    COUNTING.append(True)
    with tempfile.TemporaryDirectory() as folder:
        {**CASES, **TOO_LARGE}[name](Path(folder))
    COUNTING.clear()
    return sum(numbers for numbers, _ in COUNTED), sum(size for _, size in COUNTED) / 2**30


def main() -> None:
    """Measure the named scorers and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*CASES, *TOO_LARGE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(known)}; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--computed", action="store_true", help="count the weights, and measure nothing")
    parser.add_argument("--stage", choices=["write", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.stage == "write":
        (chosen.folder / "settings.json").write_text(json.dumps(CASES[chosen.names[0]](chosen.folder)))
        return
    if chosen.stage == "measure":
        print(json.dumps(measure(chosen.names[0], chosen.folder)))
        return
    print("| scorer | parameters | memory | seconds per picture |\n|---|---:|---:|---:|")
    for name in chosen.names or known:
        if chosen.computed or name in TOO_LARGE:
            parameters, memory = computed(name)
            print(f"| `{name}` | {parameters / 1e6:.0f} M | {memory:.1f} GiB, computed | not measured |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, name, "--folder", folder, "--threads", str(chosen.threads)]
            subprocess.run([*command, "--stage", "write"], check=True, stderr=subprocess.DEVNULL)
            done = subprocess.run([*command, "--stage", "measure"], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = f"{found['million']:.0f} M" if found["million"] else "in a file"
        print(f"| `{name}` | {size} | {found['gib']:.1f} GiB | {found['seconds']:.2g} |", flush=True)


if __name__ == "__main__":
    main()
