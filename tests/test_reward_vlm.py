"""Local vision-language judges: parity with transformers' own processors and forward, and the scores on top."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_makers import byte_tokenizer, hpsv3_file, llava_folder, qwen_folder, video_reward_folder
from safetensors.torch import load_file
from torch import Tensor

from difftune.reward import build_reward
from difftune.rewards._vlm import Judge, fitted, moved
from difftune.rewards.reward_dance import order_averaged
from difftune.rewards.video_reward import chosen_frames, merged
from difftune.rewards.vqa_score import VqaScore, yes_score
from difftune.types import UserError


def pictures(height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator) / 255


def as_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vlm")
    return {"llava": llava_folder(folder)["model"], "qwen": qwen_folder(folder)["model"]}


def test_llava_is_the_forward_of_model_and_processor(folders: dict[str, str]) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folders["llava"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["llava"])
    processor: Any = AutoImageProcessor.from_pretrained(folders["llava"])
    judge = Judge("x", folders["llava"], None, "float32")
    for picture in pictures():
        text = "USER: " + "<image>" * 16 + "\nIs it red? ASSISTANT:"
        inputs = tokenizer(text, return_tensors="pt")
        pixels = processor(images=as_pil(picture), return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = model(**inputs, pixel_values=pixels).logits[0, -1]
        got = judge.answer_logits([picture], "Is it red?")
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_qwen_is_the_forward_of_model_and_processor(folders: dict[str, str]) -> None:
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    model = Qwen2VLForConditionalGeneration.from_pretrained(folders["qwen"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen"])
    processor: Any = Qwen2VLImageProcessor.from_pretrained(folders["qwen"])
    judge = Judge("x", folders["qwen"], None, "float32")
    for picture in (*pictures(32, 48), pictures(64, 64)[0]):
        features = processor(images=as_pil(picture), return_tensors="pt")
        count = int(features.image_grid_thw.prod()) // 4
        got_patches, frames, rows, columns = judge._pictures.patches(picture)  # type: ignore[union-attr]
        assert frames == 1 and (rows * columns) // 4 == count
        torch.testing.assert_close(got_patches, features.pixel_values, atol=1e-5, rtol=0)
        seen = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        text = f"<|im_start|>user\n{seen}Is it red?<|im_end|>\n<|im_start|>assistant\n"
        inputs = tokenizer(text, return_tensors="pt")
        kinds = (inputs.input_ids == 2).long()
        with torch.no_grad():
            expected = model(**inputs, **features, mm_token_type_ids=kinds).logits[0, -1]
        torch.testing.assert_close(judge.answer_logits([picture], "Is it red?"), expected, atol=1e-4, rtol=1e-4)


def test_sizes_are_the_processors() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in ((64, 64), (512, 512), (30, 200), (720, 1280), (17, 16), (10, 900), (1000, 400)):
        for least, most in ((3136, 200704), (56 * 56, 28 * 28 * 1280)):
            expected = smart_resize(height, width, 28, least, most)
            assert fitted(height, width, 28, least, most) == tuple(expected), (height, width)


def test_vqa_score_is_a_probability_of_the_answer(folders: dict[str, str]) -> None:
    images, prompts = pictures(), ["a red circle", "stars"]
    settings = {"model": folders["llava"], "question": 'Is it "{prompt}"?'}
    every, two = (build_reward("vqa_score", **settings, among=among) for among in ("all", "two"))
    assert isinstance(every, VqaScore)
    logits = torch.stack(
        [every.judge.answer_logits([i], f'Is it "{p}"?') for i, p in zip(images, prompts, strict=True)]
    )
    torch.testing.assert_close(every(images, prompts).total, logits.softmax(-1)[:, every.yes])
    pair = logits[:, [every.yes, every.no]].softmax(-1)[:, 0]
    torch.testing.assert_close(two(images, prompts).total, pair)
    assert len(every.modules()) == 1 and yes_score(torch.zeros(4), 1, 2, "all").item() == 0.25
    with pytest.raises(UserError, match="among is 'some'"):
        build_reward("vqa_score", **settings, among="some")


def test_a_prompt_cannot_bring_picture_tokens(folders: dict[str, str]) -> None:
    judge = Judge("x", folders["llava"], None, "float32")
    plain = judge.answer_logits([pictures()[0]], "what is   ?")
    assert torch.equal(judge.answer_logits([pictures()[0]], "what is <image> ?"), plain)
    assert torch.equal(judge.answer_logits([pictures()[0]], "what is \x00 ?"), plain)


def test_reward_dance_is_a_half_for_a_picture_against_itself(folders: dict[str, str]) -> None:
    """The sheet's C121."""
    assert order_averaged(torch.tensor(0.7), torch.tensor(0.7)).item() == pytest.approx(0.5)
    images = pictures()
    score = build_reward("reward_dance", model=folders["llava"])
    same = score(images, ["a", "b"], [{"reference": image} for image in images]).total
    assert same.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    there = score(images[:1], ["a"], [{"reference": images[1]}]).total
    back = score(images[1:], ["a"], [{"reference": images[0]}]).total
    assert (there + back).item() == pytest.approx(1, abs=1e-5) and abs(there.item() - 0.5) > 1e-5
    one = build_reward("reward_dance", model=folders["llava"], both_orders=False)
    assert abs((one(images[:1], ["a"], [{"reference": images[0]}]).total.item()) - 0.5) > 1e-5


def test_other_families_are_sent_to_a_server(tmp_path: Path) -> None:
    from transformers import BlipConfig

    BlipConfig().save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is of the family 'blip', expected llava, qwen2_vl.*use vlm_server"):
        Judge("x", str(tmp_path), None, "float32")


# HPSv3


def test_hpsv3_is_the_head_on_the_hidden_state_at_its_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    settings = hpsv3_file(tmp_path)
    out = build_reward("hpsv3", **settings)(pictures(64, 64), ["a cat", "a <|Reward|> dog"])
    model = Qwen2VLForConditionalGeneration.from_pretrained(settings["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    processor: Any = Qwen2VLImageProcessor.from_pretrained(settings["model"])
    state = load_file(settings["weights"])
    for index, (picture, prompt) in enumerate(zip(pictures(64, 64), ("a cat", "a   dog"), strict=True)):
        features = processor(images=as_pil(picture), return_tensors="pt")
        seen = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
        told = f"Rate the picture for: {prompt}\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND"
        inputs = tokenizer(f"<|im_start|>user\n{seen}{told}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        with torch.no_grad():
            # transformers 4.45, of which the weights are, counted positions straight through in a forward without them.
            places = torch.arange(inputs.input_ids.shape[1]).expand(3, 1, -1)
            hidden = model.model(**inputs, **features, position_ids=places).last_hidden_state[0]
        x = hidden[inputs.input_ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")]
        assert len(x) == 1
        for number in (0, 3, 5):
            x = x @ state[f"rm_head.{number}.weight"].T + state[f"rm_head.{number}.bias"]
            x = x.relu() if number < 5 else x
        assert out.total[index].item() == pytest.approx(x[0, 0].item(), abs=1e-4)
        assert out.uncertainty is not None
        assert out.uncertainty[index].item() == pytest.approx(x[0, 1].exp().item(), abs=1e-4)


def test_hpsv3_says_what_does_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    settings = hpsv3_file(tmp_path)
    with pytest.raises(UserError, match="the instruction has no {text_prompt}"):
        build_reward("hpsv3", **{**settings, "instruction": "Rate it."})
    state = load_file(settings["weights"])
    del state["model.norm.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="the weights do not fit the model .*model.language_model.norm.weight"):
        build_reward("hpsv3", **{**settings, "weights": str(tmp_path / "short.safetensors")})


# VideoReward


def films() -> Tensor:
    """Two films of six frames, of which every two are the same: (2, 6, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(3)
    return (torch.randint(0, 256, (2, 3, 3, 64, 64), generator=generator) / 255).repeat_interleave(2, 1)


def test_a_film_of_equal_pairs_has_the_patches_of_its_pictures(folders: dict[str, str]) -> None:
    judge = Judge("x", folders["qwen"], None, "float32")
    patches = judge._pictures.patches  # type: ignore[union-attr]
    flat, *grid = patches(films()[0])
    assert grid == [3, 8, 8]
    assert torch.equal(flat, torch.cat([patches(frame)[0] for frame in films()[0, ::2]]))
    assert torch.equal(patches(films()[0, :5])[0], flat)
    assert not torch.equal(patches(films()[0, 1:])[0], flat)


@pytest.mark.parametrize("split", [False, True])
def test_video_reward_is_the_head_on_a_model_with_its_adapter(tmp_path: Path, split: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    settings = video_reward_folder(tmp_path, split)
    out = build_reward("video_reward", **settings)(films(), ["a cat", "a <|TA_reward|> dog"])
    # The same by PEFT's own forward, the processor of pictures for every two equal frames, and the sheet's formula.
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "qkv"])
    model: Any = get_peft_model(Qwen2VLForConditionalGeneration.from_pretrained(settings["model"]), lora).eval()
    checkpoint = Path(settings["weights"]) / "checkpoint-10"
    if split:
        stored = torch.load(checkpoint / "non_lora_state_dict.pth")
        adapter = load_file(checkpoint / "adapter_model.safetensors")
        stored |= {re.sub(r"(lora_[AB])", r"\1.default", key): value for key, value in adapter.items()}
    else:
        stored = torch.load(checkpoint / "model.pth")
    head = stored.pop("base_model.model.rm_head.weight")
    today = {moved(key.removeprefix("base_model.model.")): value for key, value in stored.items()}
    found = model.load_state_dict({f"base_model.model.{key}": value for key, value in today.items()}, strict=False)
    assert not found.unexpected_keys and all("lora_" not in key for key in found.missing_keys)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokens = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
    tokenizer.add_tokens(tokens, special_tokens=True)
    processor: Any = Qwen2VLImageProcessor.from_pretrained(settings["model"])
    for index, prompt in enumerate(("a cat", "a   dog")):
        features = processor(images=[as_pil(frame) for frame in films()[index, ::2]], return_tensors="pt")
        told = settings["instruction"].format(text_prompt=prompt)
        before = tokenizer("<|im_start|>user\n<|vision_start|>").input_ids
        after = tokenizer(f"<|vision_end|>{told}<|im_end|>\n<|im_start|>assistant\n").input_ids
        ids = torch.tensor([[*before, *[298] * (3 * 64 // 4), *after]])
        with torch.no_grad():
            hidden = model.base_model.model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=features.pixel_values,
                video_grid_thw=torch.tensor([[3, 8, 8]]),
                position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            ).last_hidden_state[0]
        raw = [
            (hidden[ids[0] == tokenizer.convert_tokens_to_ids(token)] @ head.T)[0, row]
            for row, token in enumerate(tokens)
        ]
        expected = [(raw[0] - 0.5) / 2, (raw[1] + 0.25) / 0.5, (raw[2] - 1) / 4]
        for name, value in zip(("vq", "mq", "ta"), expected, strict=True):
            assert out.parts[name][index].item() == pytest.approx(value.item(), abs=1e-5)
        assert out.total[index].item() == pytest.approx(sum(value.item() for value in expected), abs=3e-5)


def test_frames_are_chosen_as_qwens_video_code_does() -> None:
    assert chosen_frames(81, 16.0, 2.0) == torch.linspace(0, 80, 10).round().long().tolist()
    assert chosen_frames(12, 16.0, 2.0) == [0, 4, 7, 11]
    assert len(chosen_frames(3, 16.0, 2.0)) == 2 and chosen_frames(1, 16.0, 2.0) == [0]
    assert chosen_frames(9, 16.0, 2.0, count=4) == [0, 3, 5, 8]


def test_video_reward_says_what_does_not_fit(tmp_path: Path) -> None:
    settings = video_reward_folder(tmp_path)
    with pytest.raises(UserError, match="the instruction must hold .*each once and in this order"):
        build_reward("video_reward", **{**settings, "instruction": "{text_prompt} <|VQ_reward|>"})
    with pytest.raises(UserError, match="has no usable model_config.json"):
        build_reward("video_reward", **{**settings, "weights": str(tmp_path)})
    with pytest.raises(UserError, match="no adapter of a matrix"):
        merged("x", {"embed.lora_embedding_A.default": torch.zeros(1)}, {"lora_alpha": 1})
    with pytest.raises(UserError, match="the adapter of a.weight is incomplete"):
        merged("x", {"a.lora_A.weight": torch.zeros(1, 1), "a.weight": torch.zeros(1, 1)}, {"lora_alpha": 1})
