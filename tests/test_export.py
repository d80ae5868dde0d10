"""The artifact: what stock diffusers makes of the saved files is what the model in memory made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from difftune import __version__
from difftune.export import (
    WEIGHTS,
    WEIGHTS_2,
    add_figures,
    inspect_adapter,
    load_adapter,
    save_adapter,
    save_weights,
)
from difftune.types import NonFiniteError, UserError

CONFIG = {"algorithm": {"name": "ddpo", "lr": 3e-4}, "reward": "clip_score", "prompts": ["a ``` cat", "<b>"], "seed": 7}
OPTIONS: dict[str, Any] = {
    "config": CONFIG,
    "metadata": {"difftune.rewards": "clip_score"},
    "base_model": "owner/model",
    "name": "demo",
}


LATENTS = 4


def sd(**unet: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=10,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=8,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=None,
        unet=UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
            **unet,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(),
        **dict.fromkeys(
            [f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")],
        ),
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=16,
        shift_factor=0.0,
    )


def images(pipe: Any) -> Tensor:
    """Run the pipeline on fixed embeddings; the text encoder, where there is one, makes them."""
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    if isinstance(pipe, StableDiffusionPipeline):
        tokens = torch.arange(8)[None]
        embeds = {"prompt_embeds": pipe.text_encoder(tokens)[0], "negative_prompt_embeds": torch.zeros(1, 8, 32)}
    else:
        noise = torch.Generator().manual_seed(2)
        embeds = {
            "prompt_embeds": torch.randn(1, 8, 32, generator=noise),
            "negative_prompt_embeds": torch.zeros(1, 8, 32),
            "pooled_prompt_embeds": torch.randn(1, 64, generator=noise),
            "negative_pooled_prompt_embeds": torch.zeros(1, 64),
        }
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(**embeds, **arguments, generator=generator).images


def attach(module: nn.Module, name: str = "default", **settings: Any) -> None:
    """Add a LoRA that changes the pictures: B is not zero."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "to_out.0"], **settings}
    module.add_adapter(LoraConfig(**settings), adapter_name=name)  # type: ignore[operator]
    torch.manual_seed(3)
    for key, parameter in module.named_parameters():
        if f"lora_B.{name}" in key:
            nn.init.normal_(parameter, std=0.3)


def denoiser(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


BUILDERS = {"sd": sd, "sd3": sd3}
VARIANTS: dict[str, dict[str, Any]] = {
    "alpha above rank": {},
    "alpha equal to rank": {"lora_alpha": 4},
    "patterns": {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 5, "to_out.0": 1}},
    "rank-stabilised": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", BUILDERS)
def test_stock_diffusers_draws_what_the_model_in_memory_drew(family: str, variant: str, tmp_path: Path) -> None:
    pipe = BUILDERS[family]()
    base = images(pipe)
    attach(denoiser(pipe), **VARIANTS[variant])
    tuned = images(pipe)
    assert (tuned - base).abs().max() > 1e-3

    paths = save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert paths[0] == tmp_path / WEIGHTS and paths[-1] == tmp_path / "README.md"
    kohya = family == "sd" and variant not in ("bias", "dora")
    assert (tmp_path / "demo_kohya.safetensors" in paths) == kohya
    for path in [p for p in paths if p.suffix == ".safetensors"]:
        fresh = BUILDERS[family]()
        fresh.load_lora_weights(str(tmp_path), weight_name=path.name)
        assert (images(fresh) - tuned).abs().max() <= 1e-5, path.name
    fresh = BUILDERS[family]()
    load_adapter(fresh, tmp_path, "mine")
    assert (images(fresh) - tuned).abs().max() <= 1e-5
    assert "mine" in fresh.get_list_adapters()[next(iter(fresh.get_list_adapters()))]


def test_without_folding_the_strength_would_be_lost(tmp_path: Path) -> None:
    """The same tensors without our settings still load at full strength, as any program that ignores alpha does."""
    pipe = sd()
    attach(pipe.unet)
    tuned = images(pipe)
    save_adapter(pipe, "default", tmp_path / "ours", **OPTIONS)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "ours" / WEIGHTS), bare)
    fresh = sd()
    fresh.load_lora_weights(str(tmp_path), weight_name=bare.name)
    assert (images(fresh) - tuned).abs().max() <= 1e-5
    assert not any(key.endswith(".alpha") for key in load_file(bare))

    pipe.save_lora_weights(tmp_path, unet_lora_layers=raw_state(pipe.unet))
    naive = sd()
    naive.load_lora_weights(str(tmp_path), weight_name=WEIGHTS)
    assert (images(naive) - tuned).abs().max() > 1e-3


def raw_state(module: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(module, adapter_name="default")


def test_a_session_weight_is_not_folded_in(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    tuned = images(pipe)
    pipe.unet.set_adapters("default", 0.25)
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    fresh = sd()
    fresh.load_lora_weights(str(tmp_path))
    assert (images(fresh) - tuned).abs().max() <= 1e-5


def test_the_text_encoder_is_saved_under_the_names_that_files_use(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    attach(pipe.text_encoder, target_modules=["q_proj", "out_proj"], rank_pattern={"q_proj": 3})
    tuned = images(pipe)
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    keys = [key for key in load_file(tmp_path / WEIGHTS) if key.startswith("text_encoder")]
    assert len(keys) == 8 and all(k.startswith("text_encoder.text_model.encoder.layers.") for k in keys)
    kohya = [key for key in load_file(tmp_path / "demo_kohya.safetensors") if key.startswith("lora_te")]
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in kohya
    for name in (WEIGHTS, "demo_kohya.safetensors"):
        fresh = sd()
        fresh.load_lora_weights(str(tmp_path), weight_name=name)
        assert (images(fresh) - tuned).abs().max() <= 1e-5, name


def test_other_adapters_stay_out(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="old")
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert not any("to_k" in key or "default" in key for key in load_file(tmp_path / WEIGHTS))


# The header


def test_the_header_says_what_it_is_and_keeps_diffusers_own_entries(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet, rank_pattern={"to_v": 2})
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    ours = header(tmp_path / WEIGHTS)
    assert all(isinstance(value, str) for value in ours.values())
    assert ours["format"] == "pt"
    settings = json.loads(ours["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 4
    assert settings["unet.alpha_pattern"] == settings["unet.rank_pattern"] == {"to_v": 2}
    assert json.loads(ours["difftune.config"]) == CONFIG
    assert ours["difftune.version"] == __version__ and ours["difftune.rewards"] == "clip_score"
    assert ours["difftune.base_model"] == "owner/model"
    assert ours["modelspec.architecture"] == "stable-diffusion-v1/lora"
    kohya = header(tmp_path / "demo_kohya.safetensors")
    assert kohya["ss_network_module"] == "networks.lora" and kohya["ss_base_model_version"] == "sd_v1"
    assert kohya["ss_network_dim"] == "4" and kohya["ss_network_alpha"] == "4.0" and kohya["ss_v2"] == "False"


def test_equal_runs_leave_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        pipe = sd()
        attach(pipe.unet)
        save_adapter(pipe, "default", tmp_path / folder, **OPTIONS)
    for name in (WEIGHTS, "demo_kohya.safetensors", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # The library itself orders header entries at random; ours are sorted.
    raw = (tmp_path / "a" / WEIGHTS).read_bytes()
    entries = list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"])
    assert entries == sorted(entries) and len(entries) > 5


def test_metadata_cannot_break_the_entries_that_diffusers_reads(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    hostile = {"format": "np", "lora_adapter_metadata": "no json"}
    save_adapter(pipe, "default", tmp_path, **{**OPTIONS, "metadata": hostile})
    assert header(tmp_path / WEIGHTS)["format"] == "pt"
    sd().load_lora_weights(str(tmp_path), weight_name=WEIGHTS)
    with pytest.raises(UserError, match="metadata 'epochs' is int, expected strings"):
        save_adapter(pipe, "default", tmp_path, **{**OPTIONS, "metadata": {"epochs": 3}})


# Refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_and_nothing_is_written(value: float, tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    next(p for k, p in pipe.unet.named_parameters() if "lora_A" in k).data[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"unet\..*lora_A.*nothing was written"):
        save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sd()
    attach(pipe.unet)
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pipe.unet.requires_grad_(False)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_no_lora_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no component of StableDiffusionPipeline carries an adapter 'default'"):
        save_adapter(sd(), "default", tmp_path, **OPTIONS)
    pipe = sd()
    attach(pipe.unet, modules_to_save=["conv_out"])
    with pytest.raises(UserError, match=r"conv_out.* is trained beside the LoRA"):
        save_adapter(pipe, "default", tmp_path, **OPTIONS)
    pipe = sd()
    attach(pipe.unet, init_lora_weights="olora")
    with pytest.raises(UserError, match="initialised by 'olora', which alters the base model"):
        save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "file"), [("../../x", "_.._x"), ("a/b\0c", "a_b_c"), ("..", "adapter"), ("rün 1", "rün 1")]
)
def test_no_name_leads_out_of_the_folder(name: str, file: str, tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    paths = save_adapter(pipe, "default", tmp_path / "deep" / "er", **{**OPTIONS, "name": name})
    assert {path.name for path in paths} == {WEIGHTS, f"{file}_kohya.safetensors", "README.md"}
    assert all(path.parent == tmp_path / "deep" / "er" and path.exists() for path in paths)


# Pipelines that diffusers itself loads no LoRA into, and two experts


def ddpm() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return DDPMPipeline(unet, DDPMScheduler())


def noise_of(pipe: Any) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([5, 9])).sample


def inject(pipe: Any) -> None:
    """UNet2DModel has no adapter methods of its own: peft injects the layers."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"]), pipe.unet, "default")
    torch.manual_seed(3)
    for key, parameter in pipe.unet.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)


def test_a_pipeline_without_lora_loader_falls_back_to_peft_files(tmp_path: Path) -> None:
    pipe = ddpm()
    base = noise_of(pipe)
    inject(pipe)
    tuned = noise_of(pipe)
    assert (tuned - base).abs().max() > 1e-2
    paths = save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert [path.name for path in paths] == ["unet.safetensors", "README.md"]
    fresh = ddpm()
    load_adapter(fresh, tmp_path)
    assert (noise_of(fresh) - tuned).abs().max() <= 1e-5
    card = paths[-1].read_text()
    assert "`DDPMPipeline` loads no LoRA of this kind by itself" in card and "load_adapter(pipe" in card
    assert "load_lora_weights" not in card
    with pytest.raises(UserError, match="component 'unet', which StableDiffusion3Pipeline does not have"):
        load_adapter(sd3(), tmp_path)
    with pytest.raises(UserError, match="does not fit unet"):
        load_adapter(sd(), tmp_path)
    report = inspect_adapter(paths[0])
    assert report["format"] == "peft" and report["components"] == ["unet"] and report["ranks"] == [4]


class Plain:
    """A pipeline of the user's own: no diffusers class, a network with plain layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def test_an_object_of_the_users_own_round_trips(tmp_path: Path) -> None:
    from peft import inject_adapter_in_model

    pipe, x = Plain(), torch.ones(1, 4)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]), pipe.net, "default")
    for key, parameter in pipe.net.named_parameters():
        if "lora_B" in key:
            nn.init.ones_(parameter)
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    fresh = Plain()
    load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh.net(x), pipe.net(x), atol=1e-6)
    assert not torch.allclose(fresh.net(x), Plain().net(x), atol=1e-2)


def wan() -> WanPipeline:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 1,
    }
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(**small),
        transformer_2=WanTransformer3DModel(**small),
        boundary_ratio=0.5,
    )


def test_two_experts_get_two_files(tmp_path: Path) -> None:
    pipe = wan()
    attach(pipe.transformer, target_modules=["to_q"])
    attach(pipe.transformer_2, target_modules=["to_v"], lora_alpha=2)
    paths = save_adapter(pipe, "default", tmp_path, **OPTIONS)
    assert [path.name for path in paths] == [WEIGHTS, WEIGHTS_2, "README.md"]
    fresh = wan()
    load_adapter(fresh, tmp_path)
    x = torch.randn(1, 4, 1, 4, 4)
    arguments = {"timestep": torch.tensor([3]), "encoder_hidden_states": torch.randn(1, 3, 8)}
    for name in ("transformer", "transformer_2"):
        ours, theirs, base = (getattr(p, name)(x, **arguments).sample for p in (pipe, fresh, wan()))
        assert (ours - theirs).abs().max() <= 1e-5 < (ours - base).abs().max()
    assert "load_into_transformer_2=True" in paths[-1].read_text()


def test_trained_weights_round_trip(tmp_path: Path) -> None:
    pipe = ddpm()
    pipe.unet.requires_grad_(False)
    pipe.unet.conv_out.requires_grad_(True)
    with torch.no_grad():
        pipe.unet.conv_out.weight.add_(0.5)
    paths = save_weights(pipe, tmp_path, **OPTIONS)
    assert [path.name for path in paths] == ["unet.safetensors", "README.md"]
    assert set(load_file(paths[0])) == {"conv_out.weight", "conv_out.bias"}
    fresh = ddpm()
    assert not torch.equal(noise_of(fresh), noise_of(pipe))
    load_adapter(fresh, tmp_path)
    assert torch.equal(noise_of(fresh), noise_of(pipe))
    assert "does not load single trained parameters" in paths[-1].read_text()
    assert inspect_adapter(paths[0])["format"] == "weights"
    assert save_weights(pipe, tmp_path / "b", names=["unet.conv_in.bias"])
    assert set(load_file(tmp_path / "b" / "unet.safetensors")) == {"conv_in.bias"}
    with pytest.raises(UserError, match="it has no unet.nothing"):
        save_weights(pipe, tmp_path, names=["unet.conv_in.bias", "unet.nothing"])
    with pytest.raises(UserError, match="does not fit unet: conv_out"):
        load_adapter(sd(), tmp_path)
    pipe.unet.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to save"):
        save_weights(pipe, tmp_path, **OPTIONS)


# Loading errors


def test_loading_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter at .*nowhere.*expected a folder with pytorch_lora_weights"):
        load_adapter(sd(), tmp_path / "nowhere")
    with pytest.raises(UserError, match="it holds no .safetensors file"):
        load_adapter(sd(), tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_adapter(sd(), tmp_path / "x.safetensors")
    pipe = sd()
    attach(pipe.unet)
    save_adapter(pipe, "default", tmp_path / "a", **OPTIONS)
    with pytest.raises(UserError, match="DDPMPipeline cannot load one: wrong base model"):
        load_adapter(ddpm(), tmp_path / "a")


# Inspecting


def test_inspect_reads_rank_norm_and_loaders(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet, target_modules=["to_q", "proj_in"], rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 5})
    expected = 0.0
    for module in pipe.unet.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            update = module.scaling["default"] * b.flatten(1) @ a.flatten(1)
            expected += float(update.detach().double().square().sum())
    save_adapter(pipe, "default", tmp_path, **OPTIONS)
    for name, layout in ((WEIGHTS, "diffusers"), ("demo_kohya.safetensors", "kohya")):
        report = inspect_adapter(tmp_path / name)
        assert report["format"] == layout and report["family"] == "SD 1" and report["components"] == ["unet"]
        # The kohya file is padded to one rank, which changes no product.
        assert report["ranks"] == ([2, 4] if layout == "diffusers" else [4])
        assert report["scales"] == [1.0] and report["finite"]
        assert report["norm"] == pytest.approx(expected**0.5, rel=1e-5)
        assert report["dtypes"] == ["float32"]
        layers = report["layers"]
        comfy = report["loaders"]["ComfyUI"]
        assert report["loaders"]["diffusers"] == {"matched": layers, "total": layers, "note": ""}
        if layout == "kohya":
            assert comfy["matched"] == report["loaders"]["A1111"]["matched"] == layers
        else:
            # proj_in is matched, the attention's to_q is not.
            assert 0 < comfy["matched"] < layers and "need the kohya file" in comfy["note"]
            assert report["loaders"]["A1111"]["matched"] == 0
    assert inspect_adapter(tmp_path)["file"].endswith(WEIGHTS)


def test_inspect_sees_foreign_scales_and_bad_numbers(tmp_path: Path) -> None:
    pipe = sd3()
    attach(pipe.transformer, target_modules=["to_q", "add_q_proj"])
    state = raw_state(pipe.transformer)
    settings = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=settings)
    report = inspect_adapter(tmp_path)
    assert report["family"] == "SD 3" and report["alphas"] == [6.0] and report["scales"] == [1.5]
    assert "wrong strength" in report["loaders"]["ComfyUI"]["note"]
    key = next(iter(state))
    state[key][0, 0] = float("nan")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=state)
    assert not inspect_adapter(tmp_path)["finite"]


# The card


def test_the_card_tells_what_was_trained_and_how_to_load_it(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    figures = {"before": {"reward/mean": -2.3456789}, "after": {"reward/mean": -1.4, "reward/std": 0.25}}
    save_adapter(pipe, "default", tmp_path, **OPTIONS, figures=figures)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nbase_model: "owner/model"\nlibrary_name: diffusers\n')
    assert 'DiffusionPipeline.from_pretrained("owner/model")' in card
    assert 'pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "| `reward/mean` | -2.346 | -1.4 |" in card and "| `reward/std` |  | 0.25 |" in card
    assert "| Algorithm | `" in card and '"ddpo"' in card and "rank 4" in card
    # A prompt with three backticks must not close the fence it stands in.
    assert "````json\n" in card and "`demo_kohya.safetensors`: ComfyUI and A1111" in card
    assert str(tmp_path) not in card


def test_figures_measured_later_go_into_the_card(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    figures = {"before": {"reward/mean": -2.3456789}, "after": {"reward/mean": -1.4, "reward/std": 0.25}}
    save_adapter(pipe, "default", tmp_path / "at once", **OPTIONS, figures=figures)
    save_adapter(pipe, "default", tmp_path / "later", **OPTIONS)
    assert "## Figures" not in (tmp_path / "later/README.md").read_text()
    # Twice, as a resumed run does: the later ones count.
    add_figures(tmp_path / "later", {"before": {"reward/mean": 1.0}, "after": {"reward/mean": 2.0}})
    assert "| `reward/mean` | 1 | 2 |" in (tmp_path / "later/README.md").read_text()
    card = add_figures(tmp_path / "later", figures)
    assert card.read_text() == (tmp_path / "at once/README.md").read_text()
    assert not list((tmp_path / "later").glob(".staging-*"))
    with pytest.raises(UserError, match="is no model card"):
        add_figures(tmp_path, figures)


def test_the_card_of_an_embedded_model_loads_it_through_difftune(tmp_path: Path) -> None:
    pipe = sd()
    attach(pipe.unet)
    save_adapter(pipe, "default", tmp_path, **{**OPTIONS, "base_model": "difftune/tiny-sd"})
    assert 'pipe = difftune.load_pipeline("difftune/tiny-sd")' in (tmp_path / "README.md").read_text()
