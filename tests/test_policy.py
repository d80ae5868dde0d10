"""The policy: adapters, the reference, stored values, and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from difftune.policy import LoraConfig, Policy, find_denoisers, load_pipeline
from difftune.types import UserError


def output(policy: Policy) -> torch.Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.pipe.unet(x, 10, encoder_hidden_states=text).sample


def nudge(policy: Policy) -> None:
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


def test_a_fresh_adapter_changes_nothing_and_trains_only_itself() -> None:
    pipe = tiny.sd_pipeline()
    before = Policy(tiny.sd_pipeline(), lora=None)
    policy = Policy(pipe, LoraConfig(rank=4))
    assert torch.equal(output(policy), output(before))
    assert all("lora_" in name for name in policy.named_parameters())
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert not any(p.requires_grad for p in [*pipe.vae.parameters(), *pipe.text_encoder.parameters()])


def test_alpha_scales_and_rank_counts() -> None:
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=4, alpha=6))
    layer = policy.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling["default"] == 1.5 and layer.lora_A["default"].weight.shape[0] == 4


@pytest.mark.parametrize("targets", [["to_q"], r".*attn2\.to_(q|k)"])
def test_targets_by_ending_and_by_pattern(targets: list[str] | str) -> None:
    names = Policy(tiny.sd_pipeline(), LoraConfig(targets=targets)).named_parameters()
    assert names and all(("attn2" in n or isinstance(targets, list)) and "to_v" not in n for n in names)


def test_unmatched_targets_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"lora.targets: \['nope'\] matches no layer of unet .*to_k.*to_q"):
        Policy(tiny.sd_pipeline(), LoraConfig(targets=["nope"]))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_reference_is_the_model_as_it_came(lora: LoraConfig | None) -> None:
    policy = Policy(tiny.sd_pipeline(), lora)
    base = output(policy)
    nudge(policy)
    tuned = output(policy)
    assert not torch.equal(tuned, base)
    with policy.reference():
        assert torch.equal(output(policy), base)
    assert torch.equal(output(policy), tuned)
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_reference_survives_a_checkpoint(lora: LoraConfig | None) -> None:
    """A reference taken after loading would be the trained policy."""
    first = Policy(tiny.sd_pipeline(), lora)
    base = output(first)
    nudge(first)
    state = first.state_dict()
    second = Policy(tiny.sd_pipeline(), lora)
    if lora is None:
        nudge(second)
    second.load_state_dict(state)
    assert torch.equal(output(second), output(first))
    with second.reference():
        assert torch.equal(output(second), base)


def test_stored_adapters_swap_in_and_average() -> None:
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    nudge(policy)
    policy.store_adapter("old")
    old = output(policy)
    values = {n: p.detach().clone() for n, p in policy.named_parameters().items()}
    nudge(policy)
    new = output(policy)
    with policy.adapter("old"):
        assert torch.equal(output(policy), old)
    assert torch.equal(output(policy), new)
    policy.update_adapter("old", decay=0.75)
    with policy.adapter("old"):
        for name, parameter in policy.named_parameters().items():
            if "lora_A" in name:
                assert not torch.equal(parameter, values[name])
    moved = policy.state_dict()
    for name, parameter in policy.named_parameters().items():
        expected = 0.75 * values[name] + 0.25 * parameter.detach()
        torch.testing.assert_close(moved[f"old/{name}"], expected)
    with pytest.raises(KeyError, match="no adapter 'nope'"), policy.adapter("nope"):
        pass


def test_swapping_between_forward_and_backward_keeps_the_graph() -> None:
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    nudge(policy)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 16)

    def grads(swap: bool) -> list[torch.Tensor]:
        loss = policy.pipe.unet(x, 10, encoder_hidden_states=text).sample.square().mean()
        if swap:
            policy.store_adapter("old")
            with policy.reference():
                output(policy)
            with policy.adapter("old"):
                output(policy)
        return list(torch.autograd.grad(loss, policy.parameters()))

    for a, b in zip(grads(False), grads(True), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_adapter_is_refused() -> None:
    state = Policy(tiny.sd_pipeline(), LoraConfig(rank=2)).state_dict()
    with pytest.raises(UserError, match="do not match the policy's"):
        Policy(tiny.sd_pipeline(), LoraConfig(rank=4)).load_state_dict(state)


def test_low_precision_bases_get_fp32_adapters() -> None:
    pipe = tiny.sd_pipeline().to(torch.bfloat16)
    policy = Policy(pipe, LoraConfig(rank=2))
    assert pipe.unet.conv_in.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_denoisers_are_found_or_asked_for() -> None:
    assert list(find_denoisers(tiny.sd_pipeline())) == ["unet"]
    assert list(find_denoisers(tiny.sd3_pipeline())) == ["transformer"]

    class Odd:
        def __init__(self) -> None:
            self.one, self.two = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))

    with pytest.raises(UserError, match="cannot tell the denoiser among one, two"):
        find_denoisers(Odd())
    assert list(Policy(Odd(), LoraConfig(rank=1), denoisers=["two"]).named_parameters())


def test_a_second_adapter_and_nothing_to_train_are_refused() -> None:
    pipe = tiny.sd_pipeline()
    Policy(pipe, LoraConfig(rank=2))
    with pytest.raises(UserError, match="already carries an adapter"):
        Policy(pipe, LoraConfig(rank=2))
    frozen = tiny.sd_pipeline()
    frozen.unet.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        Policy(frozen, lora=None)


def test_loading_from_a_folder_and_what_is_no_model(tmp_path: Path) -> None:
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model", dtype="bf16", scheduler="DDPMScheduler")
    assert pipe.unet.dtype == torch.bfloat16 and type(pipe.scheduler).__name__ == "DDPMScheduler"
    assert load_pipeline(pipe) is pipe
    with pytest.raises(UserError, match="which is not a folder"):
        load_pipeline(str(tmp_path / "nope"))
    with pytest.raises(UserError, match="expected one of the embedded pipelines: difftune/tiny-flow, difftune/tiny-sd"):
        load_pipeline("difftune/tiny-s")
    with pytest.raises(UserError, match="diffusers has no 'Nope'"):
        load_pipeline(tmp_path / "model", scheduler="Nope")
