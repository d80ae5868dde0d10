"""Memory and time of scorers at the size of their published weights, which are random here: run it as a program.

    python tests/full_size_rewards.py [NAME ...] [--threads 1]

Each scorer is written into a temporary folder by one process and measured by another: parameters, the most memory that
the process held, and the processor's seconds per picture of 512 x 512 pixels, after a first call.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftune.reward import build_reward
from difftune.zoo import model_path


def saved(folder: Path, network: Any, dtype: torch.dtype = torch.float32) -> str:
    """Write a network, whose weights hardly matter but must not be subnormal, and return its folder."""
    network.to(dtype).save_pretrained(folder)
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
    return {"model": saved(folder / "clip", CLIPModel(config))}


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
        layer = nn.Linear(columns, rows)
        state |= {f"{prefix}.{number}.weight": layer.weight.detach(), f"{prefix}.{number}.bias": layer.bias.detach()}
    return state


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
    return {"model": saved(folder / "siglip", SiglipVisionModel(config)), "head": str(folder / "head.pth")}


def detector(folder: Path) -> dict[str, Any]:
    """Write YOLOS-base and ViT-L/14."""
    from transformers import YolosConfig, YolosForObjectDetection

    labels = {index: ("cup" if index == 0 else f"kind{index}") for index in range(91)}
    config = YolosConfig(image_size=[800, 1344], id2label=labels)
    found = saved(folder / "yolos", YolosForObjectDetection(config))
    return {**large(folder), "tokenizer": str(folder / "clip"), "detector": found}


def qwen(folder: Path) -> dict[str, Any]:
    """Write Qwen2-VL-2B, in bf16."""
    from reward_makers import byte_tokenizer
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    byte_tokenizer(folder / "qwen")
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"hidden_size": 1536},
        image_token_id=2,
        video_token_id=298,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    network = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(before)
    Qwen2VLImageProcessor().save_pretrained(folder / "qwen")
    return {"model": saved(folder / "qwen", network, torch.bfloat16), "dtype": "bfloat16"}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "clip_score": large,
    "pickscore": huge,
    "aesthetic": aesthetic,
    "aesthetic_v25": siglip,
    "geneval": detector,
    "vqa_score": qwen,
    "nsfw": lambda folder: {},
    "ocr": lambda folder: {},
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Return parameters, GiB at the peak, and the processor's seconds per picture."""
    scorer = build_reward(name, **json.loads((folder / "settings.json").read_text()))
    images = torch.rand(3, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    prompts, metadata = ['two cups that say "tea"'] * 3, [{"include": [{"class": "cup"}]}] * 3
    with torch.no_grad():
        scorer(images[:1], prompts[:1], metadata[:1])
        started = time.process_time()
        scorer(images[1:], prompts[1:], metadata[1:])
    seconds = (time.process_time() - started) / 2
    parameters = sum(p.numel() for module in scorer.modules() for p in module.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"million": parameters / 1e6, "gib": peak, "seconds": seconds}


def main() -> None:
    """Measure the named scorers and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(CASES)}; all by default")
    parser.add_argument("--threads", type=int, default=1)
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
    for name in chosen.names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, name, "--folder", folder, "--threads", str(chosen.threads)]
            subprocess.run([*command, "--stage", "write"], check=True, stderr=subprocess.DEVNULL)
            done = subprocess.run([*command, "--stage", "measure"], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = f"{found['million']:.0f} M" if found["million"] else "in a file"
        print(f"| `{name}` | {size} | {found['gib']:.1f} GiB | {found['seconds']:.2g} |", flush=True)


if __name__ == "__main__":
    main()
