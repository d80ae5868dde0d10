"""The sampler on real pipeline classes: recording, replaying, probing, backpropagating, and the parity gate."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from pipelines import CASES
from torch import nn

import difftune as dt
from difftune.algorithm import Batch, Context
from difftune.policy import LoraConfig, Policy
from difftune.prompt_cache import PromptCache
from difftune.prompts import load_prompts
from difftune.puppet import Prediction
from difftune.reward import FunctionReward
from difftune.sampler import Sampler, StepView, keyed_noise, sample_keys, to_images
from difftune.transition import Gaussian
from difftune.types import NonFiniteError, ParityError, Trajectory, UserError
from difftune.window import Window

PROMPTS = ["a red cat", "two dog", "", "a red cat"]
ETA = {"sd": 1.0, "sd3": 0.7}


def make(kind: str, seed: int = 0, **settings: Any) -> Sampler:
    """A sampler over a tiny pipeline with a LoRA that already does something."""
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return Sampler(policy, **{"steps": 5, "guidance_scale": 3.0, "eta": ETA[kind], "batch_size": 4, **settings})


@pytest.fixture(params=sorted(tiny.PIPELINES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters().items() if p.grad is not None}
    for parameter in policy.parameters():
        parameter.grad = None
    return found


# -- record ------------------------------------------------------------------------------------------------------


def test_rollout_records_every_step(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS, seed=3)
    assert traj.states.shape == (4, 6, 4, 8, 8)
    assert traj.images is not None and traj.images.shape == (4, 3, 16, 16)
    assert 0 <= float(traj.images.min()) and float(traj.images.max()) <= 1
    # A flow SDE's last step lands on the picture, so it carries no noise.
    assert traj.stochastic.tolist() == [True] * 4 + [kind == "sd"]
    assert torch.isfinite(traj.log_probs).all()
    assert traj.log_probs[:, ~traj.stochastic].eq(0).all()
    assert sampler.denoiser_calls == 5


def test_without_noise_the_rollout_is_the_stock_pipelines(kind: str) -> None:
    """C76: eta = 0 through the puppet gives what the pipeline gives with its own scheduler."""
    sampler = make(kind, dynamics="ode", eta=0.0)
    pipe = sampler.policy.pipe
    traj = sampler.rollout(PROMPTS)
    stock = pipe(
        prompt=PROMPTS, num_inference_steps=5, guidance_scale=3.0, output_type="pt", latents=traj.states[:, 0],
        **pipe.difftune_call if kind == "sd3" else {},
    ).images  # fmt: skip
    torch.testing.assert_close(traj.images, stock, atol=1e-5, rtol=0)


def test_the_pipeline_is_left_as_it_was(kind: str) -> None:
    sampler = make(kind)
    pipe = sampler.policy.pipe
    scheduler, module = pipe.scheduler, next(iter(sampler.policy.denoisers.values()))
    forward = module.forward
    sampler.rollout(PROMPTS)
    assert pipe.scheduler is scheduler and module.forward == forward
    assert "encode_prompt" not in vars(pipe) and "forward" not in vars(module)
    assert torch.is_grad_enabled()


def test_noise_belongs_to_samples_not_to_batches(kind: str) -> None:
    small, large = make(kind, batch_size=2), make(kind, batch_size=4)
    a, b = small.rollout(PROMPTS, seed=1), large.rollout(PROMPTS, seed=1)
    assert torch.equal(a.states[:, 0], b.states[:, 0])
    like = torch.empty(4, 4, 8, 8)
    noise = keyed_noise(a.keys, "step2", like)
    assert torch.equal(noise[1:3], keyed_noise(a.keys[1:3], "step2", like[1:3]))
    assert a.images is not None and b.images is not None
    torch.testing.assert_close(a.images, b.images, atol=1e-5, rtol=0)


def test_order_of_prompts_does_not_matter(kind: str) -> None:
    sampler = make(kind)
    a = sampler.rollout(PROMPTS, seed=1)
    b = sampler.rollout([PROMPTS[i] for i in (2, 1, 0)], seed=1)
    assert a.images is not None and b.images is not None
    torch.testing.assert_close(a.images[[2, 1, 0]], b.images, atol=1e-5, rtol=0)


def test_seed_epoch_prompt_and_repetition_change_the_noise() -> None:
    keys = sample_keys(["a", "a", "b"], 0, 0) + sample_keys(["a"], 1, 0) + sample_keys(["a"], 0, 1)
    noise = keyed_noise(keys, "pipeline", torch.empty(5, 16))
    for i in range(5):
        for j in range(i):
            assert not torch.equal(noise[i], noise[j])
    assert not torch.equal(noise, keyed_noise(keys, "step0", torch.empty(5, 16)))


def test_same_seed_is_byte_equal(kind: str) -> None:
    a, b = make(kind).rollout(PROMPTS, seed=4), make(kind).rollout(PROMPTS, seed=4)
    assert torch.equal(a.states, b.states) and torch.equal(a.log_probs, b.log_probs)


def test_a_window_makes_the_other_steps_ode_steps(kind: str) -> None:
    traj = make(kind, window=[1, 2]).rollout(PROMPTS)
    assert traj.stochastic_steps == [1, 2]


def test_a_window_moves_with_the_epoch_and_replays_as_it_was(kind: str) -> None:
    sampler = make(kind, window={"kind": "sliding", "size": 2, "stride": 1, "every": 2})
    drawn = [sampler.rollout(PROMPTS[:2], epoch=epoch, decode=False) for epoch in (1, 2, 3, 5, 7)]
    assert [traj.stochastic_steps for traj in drawn] == [[0, 1], [0, 1], [1, 2], [2, 3], [0, 1]]
    for traj in drawn:
        assert sampler.check_parity(traj)["max_ratio_error"] == 0
    again = sampler.backprop(PROMPTS[:2], epoch=3).detach()
    torch.testing.assert_close(again, sampler.rollout(PROMPTS[:2], epoch=3).images, atol=1e-6, rtol=0)


def test_a_random_window_is_drawn_evenly_and_by_seed_and_epoch_alone() -> None:
    window = Window(kind="random", size=3)
    drawn = [window.steps_at(11, 0, epoch) for epoch in range(1, 1001)]
    assert drawn == [window.steps_at(11, 0, epoch) for epoch in range(1, 1001)]
    assert drawn[:50] != [window.steps_at(11, 1, epoch) for epoch in range(1, 51)]
    assert all(len(set(steps)) == 3 and list(steps) == sorted(steps) for steps in drawn)
    assert all(steps[-1] - steps[0] == 2 for steps in drawn), "neighbours, as in Flow-GRPO-Fast"
    counts = Counter(steps[0] for steps in drawn)
    # Binomial with p = 1 / 8: standard deviation 10.5 of 1000; the last of the 11 steps is left out.
    assert set(counts) == set(range(8)) and all(abs(count - 125) < 53 for count in counts.values())
    slow = Window(kind="random", size=3, every=25)
    assert len({slow.steps_at(11, 0, epoch) for epoch in range(1, 26)}) == 1


def test_a_sliding_window_is_mixgrpos_and_stays_within_its_bounds() -> None:
    mix = Window(kind="sliding", size=4, stride=1, every=25)
    assert mix.steps_at(25, 0, 1) == mix.steps_at(25, 7, 25) == (0, 1, 2, 3)
    assert mix.steps_at(25, 0, 26) == (1, 2, 3, 4)
    assert mix.steps_at(25, 0, 20 * 25 + 1) == (20, 21, 22, 23) and mix.steps_at(25, 0, 21 * 25 + 1) == (0, 1, 2, 3)
    inner = Window(kind="sliding", size=2, stride=2, first=1, last=6)
    assert [inner.steps_at(10, 0, epoch) for epoch in (1, 2, 3, 4)] == [(1, 2), (3, 4), (5, 6), (1, 2)]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"kind": "sliding", "size": 5}, "sampler.window.size: got 5, but steps 0 to 3 are 4; lower size"),
        ({"kind": "random", "size": 2, "first": 3}, "sampler.window.size: got 2, but steps 3 to 3 are 1"),
        ({"kind": "random", "last": 5}, "sampler.window.last: got step 5, expected at most 4"),
        ({"kind": "jumping"}, "sampler.window.kind: .*'random' or 'sliding', got 'jumping'"),
        ({"size": 2}, "sampler.window.kind: field required"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(window: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("sd", window=window)


def test_conditions_are_cut_into_batches(kind: str) -> None:
    sampler = make(kind, batch_size=3)
    traj = sampler.rollout(PROMPTS, conditions={"negative_prompt": ["dog", "cat", "", "dog"]})
    plain = sampler.rollout(PROMPTS)
    assert not torch.equal(traj.images[0], plain.images[0])  # type: ignore[index]
    torch.testing.assert_close(traj.images[2], plain.images[2], atol=1e-5, rtol=0)  # type: ignore[index]
    assert list(traj.conditions["negative_prompt"]) == ["dog", "cat", "", "dog"]


def test_prompts_are_encoded_once(kind: str) -> None:
    sampler = make(kind)
    calls = []
    sampler.policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    sampler.rollout(PROMPTS)
    first = len(calls)
    traj = sampler.rollout(PROMPTS, epoch=1)
    sampler.replay(traj, lambda view: None)
    assert first > 0 and len(calls) == first


def test_cached_embeddings_are_the_pipelines_own(kind: str) -> None:
    pipe = tiny.PIPELINES[kind]()
    sampler = Sampler(Policy(pipe, LoraConfig(rank=2)), steps=2)
    given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    own = {"prompt": PROMPTS} if kind == "sd" else {"prompt": PROMPTS, "prompt_2": None, "prompt_3": None}
    direct = pipe.encode_prompt(**own, **given)
    with sampler._cache.open():
        cached = pipe.encode_prompt(**own, **given)
    assert len(direct) == len(cached)
    for a, b in zip(direct, cached, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_arguments_the_pipeline_does_not_take_are_refused() -> None:
    with pytest.raises(UserError, match="StableDiffusionPipeline takes no 'num_frames'"):
        make("sd", call={"num_frames": 8})
    with pytest.raises(UserError, match="sampler.window: got step 9, expected steps from 0 to 4"):
        make("sd", window=[9])


def test_pictures_are_opened_when_the_pipeline_is_called(tmp_path: Path) -> None:
    case = CASES["StableDiffusionInpaintPipeline (4 channels)"]
    sampler = Sampler(Policy(case.build(), LoraConfig(rank=2)), steps=3, call=case.call)
    given = case.conditions(2)
    expected = sampler.rollout(PROMPTS[:2], conditions=given)
    paths: dict[str, list[Any]] = {name: [] for name in given}
    for name, pictures in given.items():
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / f"{name}{index}.png")
            paths[name].append(tmp_path / f"{name}{index}.png")
    got = sampler.rollout(PROMPTS[:2], conditions=paths)
    assert torch.equal(got.states, expected.states) and torch.equal(got.images, expected.images)  # type: ignore[arg-type]
    part = got.select([1])
    assert list(part.conditions["image"]) == paths["image"][1:]
    assert sampler.check_parity(got)["max_ratio_error"] == 0


def test_a_run_inpaints_the_pictures_of_its_prompt_file(tmp_path: Path) -> None:
    case = CASES["StableDiffusionInpaintPipeline (4 channels)"]
    rows = []
    for index, (image, mask) in enumerate(zip(*case.conditions(2).values(), strict=True)):
        image.save(tmp_path / f"{index}.png")
        mask.save(tmp_path / f"mask{index}.png")
        rows.append({"prompt": PROMPTS[index], "image": f"{index}.png", "mask_image": f"mask{index}.png"})
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    sampler = Sampler(Policy(case.build(), LoraConfig(rank=2)), steps=3, call=case.call)
    trainer = dt.Trainer(
        policy=sampler.policy,
        sampler=sampler,
        algorithm=dt.build_algorithm("ddpo"),
        reward="jpeg_compressibility",
        prompts=file,
        epochs=1,
        prompts_per_epoch=2,
        samples_per_prompt=2,
    )
    before = [parameter.detach().clone() for parameter in sampler.policy.parameters()]
    (metrics,) = list(trainer)
    assert trainer.parity is not None and trainer.parity["max_ratio_error"] == 0
    assert metrics["denoiser_calls"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, sampler.policy.parameters(), strict=True))
    rows[1]["image"] = "lost.png"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: image 'lost\.png': no such file"):
        load_prompts(file)


def test_numbers_are_one_for_all_samples_or_refused() -> None:
    case = CASES["StableDiffusionImg2ImgPipeline"]
    sampler = Sampler(Policy(case.build(), LoraConfig(rank=2)), steps=5)
    given = case.conditions(2)
    traj = sampler.rollout(PROMPTS[:2], conditions={**given, "strength": [0.6, 0.6]})
    assert traj.num_steps == 3
    with pytest.raises(UserError, match=r"strength is 0\.6 and 0\.8, and StableDiffusionImg2ImgPipeline takes one"):
        sampler.check_conditions({**given, "strength": [0.6, 0.8]})
    with pytest.raises(UserError, match="StableDiffusionImg2ImgPipeline takes no 'num_frames'"):
        sampler.check_conditions({"num_frames": [8, 8]})
    # Class labels are one number per sample.
    labels = CASES["DiTPipeline"]
    Sampler(Policy(labels.build(), LoraConfig(rank=2)), steps=2).check_conditions({"class_labels": [1, 2]})


@pytest.mark.parametrize("name", ["alignprop", "draft", "refl", "drtune"])
def test_reward_gradients_know_where_a_loop_that_begins_in_the_middle_ends(name: str) -> None:
    case = CASES["StableDiffusionImg2ImgPipeline"]
    sampler = Sampler(Policy(case.build(), LoraConfig(rank=2)), steps=8, call={**case.call, "strength": 0.5})
    given = case.conditions(2)
    keys = sample_keys(PROMPTS[:2], 0, 1)
    assert sampler.loop_length(PROMPTS[:2], keys, given) == 4 and sampler.denoiser_calls <= 1
    settings = {"trained_steps": 4} if name == "drtune" else {}
    algorithm = dt.build_algorithm(name, loss="negative", **settings)
    seen: list[Any] = []
    draw = sampler.backprop

    def backprop(*args: Any, **settings: Any) -> torch.Tensor:
        seen.append(settings)
        return draw(*args, **settings)

    sampler.backprop = backprop  # type: ignore[method-assign]
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    batch = Batch(tuple(PROMPTS[:2]), keys, {}, None, conditions=given, metadata=[{}] * 2)
    algorithm.accumulate(batch, Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0))
    assert any(p.grad is not None and bool(p.grad.any()) for p in sampler.policy.parameters())
    assert max(seen[0]["grad_steps"]) <= 3 and (name != "drtune" or list(seen[0]["grad_steps"]) == [0, 1, 2, 3])


def test_a_window_outside_the_loop_is_told_in_one_line() -> None:
    case = CASES["StableDiffusionImg2ImgPipeline"]
    call = {**case.call, "strength": 0.5}
    sampler = Sampler(Policy(case.build(), LoraConfig(rank=2)), steps=8, call=call, window=[6])
    traj = sampler.rollout(PROMPTS[:1], conditions=case.conditions(1))
    with pytest.raises(UserError, match="none of the loop's 4 steps carries noise .* a window in the loop"):
        sampler.replay(traj, lambda view: None)


def test_host_storage_takes_everything_that_is_large() -> None:
    moved = []

    class Far(torch.Tensor):
        """A tensor that says it is elsewhere, and takes down that it was asked to come."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("meta")

        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            moved.append(args)
            return torch.Tensor(self).as_subclass(Near)

    class Near(torch.Tensor):
        def pin_memory(self, device: Any = None) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    traj = make("sd").rollout(PROMPTS[:2])
    kept = torch.ones_like(traj.states[:, 1:], dtype=torch.bool)
    far = {name: getattr(traj, name).as_subclass(Far) for name in ("states", "images")}
    there = dataclasses.replace(traj, **far, steps_out=traj.states[:, 1:].as_subclass(Far), kept=kept.as_subclass(Far))
    here = there.on_host()
    assert moved == [("cpu",)] * 4
    assert all(type(getattr(here, name)) is torch.Tensor for name in ("states", "steps_out", "kept", "images"))


def test_non_finite_latents_stop_and_name_the_sample() -> None:
    sampler = make("sd")
    with torch.no_grad():
        sampler.policy.parameters()[0].fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"sample 0 \(prompt 'a red cat'\)"):
        sampler.rollout(PROMPTS)


# -- replay ------------------------------------------------------------------------------------------------------


def test_ratio_is_exactly_one_at_every_stochastic_step(kind: str) -> None:
    """C20, whatever the pipeline."""
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    seen: dict[int, float] = {}

    def on_step(view: StepView) -> None:
        seen[view.index] = float((view.log_prob - view.old_log_prob).abs().max())

    sampler.replay(traj, on_step)
    assert seen == dict.fromkeys(traj.stochastic_steps, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_ratio_is_one_in_low_precision_too(kind: str, dtype: torch.dtype) -> None:
    sampler = make(kind)
    sampler.policy.pipe.to(dtype)
    for parameter in sampler.policy.parameters():
        parameter.data = parameter.data.float()
    traj = sampler.rollout(PROMPTS)
    assert traj.states.dtype == dtype and traj.log_probs.dtype == torch.float32
    assert sampler.check_parity(traj)["max_ratio_error"] == 0


def test_replaying_k_steps_costs_k_calls(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    runs = []
    original = type(next(iter(sampler.policy.denoisers.values()))).forward
    module = next(iter(sampler.policy.denoisers.values()))
    # Counted below the tap, at a layer that runs once per forward pass.
    module.get_submodule("conv_in" if kind == "sd" else "pos_embed").register_forward_hook(lambda *_: runs.append(1))
    for steps in ([2], [0, 3], traj.stochastic_steps):
        runs.clear()
        before = sampler.denoiser_calls
        sampler.replay(traj, lambda view: None, steps=steps)
        assert len(runs) == sampler.denoiser_calls - before == len(steps)
    assert type(module).forward is original


def test_replay_of_a_selection_and_another_batch_size(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    part = traj.select([3, 1])
    seen = []
    sampler.replay(part, lambda view: seen.append((view.log_prob - view.old_log_prob).abs().max()), steps=[1])
    assert float(seen[0]) < 1e-5
    assert part.prompts == ("a red cat", "two dog")


def test_windowed_gradients_add_up_to_the_whole(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    sampler.replay(traj, lambda view: view.log_prob.sum().backward())
    whole = gradients(sampler.policy)
    for k in traj.stochastic_steps:
        sampler.replay(traj, lambda view: view.log_prob.sum().backward(), steps=[k])
    parts = gradients(sampler.policy)
    assert whole.keys() == parts.keys() and whole
    for name, grad in whole.items():
        torch.testing.assert_close(grad, parts[name], atol=1e-6, rtol=1e-4)


def test_gradient_of_a_replay_is_the_derivative(kind: str) -> None:
    """A directional finite difference of a step's log-prob, with the weights in fp64."""
    sampler = make(kind)
    sampler.policy.pipe.to(torch.float64)
    for parameter in sampler.policy.parameters():
        parameter.data = parameter.data.double()
    traj = sampler.rollout(PROMPTS[:2])
    assert traj.states.dtype == torch.float64

    def value() -> float:
        out = []
        sampler.replay(traj, lambda view: out.append(float(view.log_prob.sum())), steps=[1], grad=False)
        return out[0]

    sampler.replay(traj, lambda view: view.log_prob.sum().backward(), steps=[1])
    grads = gradients(sampler.policy)
    params = sampler.policy.named_parameters()
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}
    expected = sum(float((grads[n] * direction[n]).sum()) for n in grads)
    values = []
    for sign in (1, -1):
        for n, p in params.items():
            p.data += sign * 1e-5 * direction[n]
        values.append(value())
        for n, p in params.items():
            p.data -= sign * 1e-5 * direction[n]
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_deterministic_steps_cannot_be_replayed(kind: str) -> None:
    """C76: what has no density has no log-prob."""
    sampler = make(kind, window=[1])
    traj = sampler.rollout(PROMPTS)
    with pytest.raises(ValueError, match="step 0 carries no noise"):
        sampler.replay(traj, lambda view: None, steps=[0])
    ode = make(kind, dynamics="ode", eta=0.0)
    with pytest.raises(ValueError, match="none of the loop.s 5 steps carries noise"):
        ode.replay(ode.rollout(PROMPTS), lambda view: None)


def test_transitions_under_the_reference_differ(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    mine = sampler.transitions(traj, [1])[1]
    with sampler.policy.reference():
        reference = sampler.transitions(traj, [1])[1]
    assert mine.std == reference.std
    assert not mine.mean.requires_grad
    assert float(mine.kl(reference).min()) > 0


# -- what the pipeline overwrites --------------------------------------------------------------------------------


def inpainting() -> tuple[Sampler, Trajectory]:
    """A four-channel UNet that paints the right half; the pipeline puts the left one back after every step."""
    case = CASES["StableDiffusionInpaintPipeline (4 channels)"]
    policy = Policy(case.build(), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    sampler = Sampler(policy, steps=4, eta=0.7, call=case.call)
    return sampler, sampler.rollout(PROMPTS[:2], conditions=case.conditions(2))


def test_what_inpainting_overwrites_is_not_in_the_log_prob() -> None:
    sampler, traj = inpainting()
    assert traj.kept is not None and traj.kept.shape == traj.states[:, 1:].shape
    assert traj.kept[..., 4:].all() and not traj.kept[..., :4].any()
    assert sampler.check_parity(traj)["max_ratio_error"] == 0
    views: list[StepView] = []
    sampler.replay(traj, views.append, grad=False)
    with sampler.policy.reference():
        reference = sampler.transitions(traj)
    for view in views:
        out = traj.step_out(view.index)
        half = Gaussian(view.mean[..., 4:], view.std)
        expected = half.log_prob(out[..., 4:], "sum")
        torch.testing.assert_close(view.log_prob * view.dims, expected, rtol=1e-5, atol=1e-3)
        other = Gaussian(reference[view.index].mean[..., 4:], view.std)
        torch.testing.assert_close(view.gaussian.kl(reference[view.index], "sum"), half.kl(other, "sum"))


def test_masks_follow_their_samples() -> None:
    _, traj = inpainting()
    assert traj.kept is not None
    part = traj.select([1])
    assert part.kept is not None and torch.equal(part.kept, traj.kept[1:])
    plain = dataclasses.replace(part, kept=None)
    joined = Trajectory.cat([part, plain])
    assert joined.kept is not None and joined.kept[1].all() and torch.equal(joined.kept[:1], part.kept)


def test_a_pipeline_that_rescales_its_latents_overwrites_nothing() -> None:
    class Restless(Dots):
        @torch.no_grad()
        def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
            x = torch.stack([torch.randn(12, generator=g) for g in generator])
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                x = 1.1 * self.scheduler.step(self.brain(x, t), t, x).prev_sample
                x[:, :3] = 0.5  # and puts three numbers back, in place
            return (torch.sigmoid(x).reshape(-1, 3, 2, 2),)

    sampler = Sampler(Policy(Restless(Brain(), diffusers.DDIMScheduler()), LoraConfig(rank=2)), steps=4)
    traj = sampler.rollout(["x", "y"])
    assert traj.kept is not None and traj.kept[..., 3:].all() and not traj.kept[..., :3].any()
    assert sampler.check_parity(traj)["max_ratio_error"] == 0


# -- decode and pull back ----------------------------------------------------------------------------------------


def test_decode_shows_the_finished_latents_and_carries_a_graph(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS[:2])
    before = sampler.denoiser_calls
    latents = traj.states[:, -1].clone().requires_grad_()
    images = sampler.decode(latents, traj.prompts, traj.keys)
    torch.testing.assert_close(images.detach(), traj.images, atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(images[0].sum(), latents)
    assert slope[0].abs().sum() > 0 and not slope[1].any() and sampler.denoiser_calls == before


def test_pull_back_is_the_transposed_jacobian(kind: str) -> None:
    """Against a finite difference of the step's mean along a direction, in fp64."""
    sampler = make(kind)
    sampler.policy.pipe.to(torch.float64)
    for parameter in sampler.policy.parameters():
        parameter.data = parameter.data.double()
    traj = sampler.rollout(PROMPTS[:1])
    generator = torch.Generator().manual_seed(0)
    vector, along = torch.randn((2, *traj.states[:, 2].shape), generator=generator, dtype=torch.float64)
    before = sampler.denoiser_calls
    got = (sampler.pull_back(traj, 2, vector) * along).sum()
    assert sampler.denoiser_calls == before + 1

    def mean(shift: float) -> torch.Tensor:
        states = traj.states.clone()
        states[:, 2] += shift * along
        return sampler.transitions(dataclasses.replace(traj, states=states), [2])[2].mean

    expected = ((mean(1e-5) - mean(-1e-5)) / 2e-5 * vector).sum()
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="got step 0, expected 1 to 4"):
        sampler.pull_back(traj, 0, vector)


def test_pulling_back_through_a_blend_gives_nothing_where_it_overwrites() -> None:
    sampler, traj = inpainting()
    slope = sampler.pull_back(traj, 2, torch.ones_like(traj.states[:, 2]))
    assert not slope[..., :4].any() and slope[..., 4:].abs().min() > 0


# -- pipelines that need what was skipped ------------------------------------------------------------------------


def test_steps_are_run_where_the_pipeline_reads_what_the_denoiser_leaves_behind() -> None:
    class Watching(Dots):
        @torch.no_grad()
        def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
            x = torch.stack([torch.randn(12, generator=g) for g in generator])
            self.scheduler.set_timesteps(num_inference_steps)
            seen: dict[str, torch.Tensor] = {}
            with self.brain.inner.register_forward_hook(lambda m, a, out: seen.update(last=out)):
                for t in self.scheduler.timesteps:
                    seen.clear()
                    out = self.brain(x, t)
                    x = self.scheduler.step(out + 0.1 * seen["last"].mean(), t, x).prev_sample
            return (torch.sigmoid(x).reshape(-1, 3, 2, 2),)

    sampler = Sampler(Policy(Watching(Brain(), diffusers.DDIMScheduler()), LoraConfig(rank=2)), steps=4)
    traj = sampler.rollout(["x"])
    before = sampler.denoiser_calls
    views: list[StepView] = []
    sampler.replay(traj, views.append, steps=[2], grad=False)
    assert [view.index for view in views] == [2] and torch.equal(views[0].log_prob, views[0].old_log_prob)
    assert sampler.denoiser_calls - before == 3


def test_momentum_from_step_to_step_is_refused_by_the_gate() -> None:
    class Swinging(Dots):
        @torch.no_grad()
        def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
            x = torch.stack([torch.randn(12, generator=g) for g in generator])
            self.scheduler.set_timesteps(num_inference_steps)
            momentum = torch.zeros_like(x)
            for t in self.scheduler.timesteps:
                momentum = 0.5 * momentum + self.brain(x, t)
                x = self.scheduler.step(momentum, t, x).prev_sample
            return (torch.sigmoid(x).reshape(-1, 3, 2, 2),)

    sampler = Sampler(Policy(Swinging(Brain(), diffusers.DDIMScheduler()), LoraConfig(rank=2)), steps=4)
    with pytest.raises(ParityError, match="Swinging carries what it predicts at one step on to the next"):
        sampler.check_parity(sampler.rollout(["x"]))


# -- probe -------------------------------------------------------------------------------------------------------


def test_probe_is_the_pipelines_guided_prediction(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    points = [(801.0, x), (201.0, 0.5 * x)]
    seen = []
    sampler.probe(PROMPTS, points, lambda view: seen.append((view.timestep, view.output.detach(), view.level)))
    pipe, module = sampler.policy.pipe, next(iter(sampler.policy.denoisers.values()))
    given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        for (t, x_t), (timestep, output, level) in zip(points, seen, strict=True):
            assert timestep == t
            if kind == "sd":
                text, blank = pipe.encode_prompt(prompt=PROMPTS, **given)
                cond, uncond = (module(x_t, t, encoder_hidden_states=e).sample for e in (text, blank))
            else:
                text, blank, pooled, pooled_blank = pipe.encode_prompt(
                    prompt=PROMPTS, prompt_2=None, prompt_3=None, max_sequence_length=8, **given
                )
                time = torch.full((4,), t)
                cond, uncond = (
                    module(hidden_states=x_t, timestep=time, encoder_hidden_states=e, pooled_projections=p).sample
                    for e, p in ((text, pooled), (blank, pooled_blank))
                )
            torch.testing.assert_close(output, uncond + 3.0 * (cond - uncond), atol=1e-5, rtol=1e-5)
            assert level.sigma == pytest.approx(sampler.level(t).sigma, abs=1e-6)
    assert traj.num_steps == 5


def test_probe_takes_another_guidance_than_the_sampler(kind: str) -> None:
    """1 is the bare conditional prediction, at half the rows; the sampler goes on with its own."""
    guided, bare = make(kind, guidance_scale=4.0), make(kind, guidance_scale=1.0)
    x = torch.randn(guided.rollout(PROMPTS).states[:, 0].shape, generator=torch.Generator().manual_seed(1))
    points = [(guided.timestep(0.6), x)]

    def ask(sampler: Sampler, **settings: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        sampler.probe(PROMPTS, points, lambda view: seen.append(view.output), grad=False, **settings)
        return seen[0]

    rows = guided.denoiser_rows
    assert torch.equal(ask(guided, guidance_scale=1.0), ask(bare))
    assert guided.denoiser_rows - rows == len(PROMPTS)
    assert not torch.equal(ask(guided), ask(bare)) and torch.equal(ask(guided, guidance_scale=4.0), ask(guided))


def test_preferences_are_fitted_to_the_bare_prediction_and_rwr_to_the_guided_one(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS)
    values = {"reward": torch.ones(4), "weight": torch.ones(4), "label": torch.tensor([1.0, -1.0, 1.0, -1.0])}
    batch = Batch(tuple(PROMPTS), traj.keys, values, traj, metadata=[{}] * 4, units=[[0, 1], [2, 3]])
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    for name, guided in (("raft", False), ("kto", False), ("rwr", True)):
        before = sampler.denoiser_rows, sampler.denoiser_calls
        dt.build_algorithm(name, timesteps=2).accumulate(batch, context)
        rows, calls = sampler.denoiser_rows - before[0], sampler.denoiser_calls - before[1]
        assert rows == calls * len(PROMPTS) * (2 if guided else 1)


def test_probe_costs_one_call_a_point_and_carries_gradients(kind: str) -> None:
    sampler = make(kind)
    sampler.rollout(PROMPTS)
    x = torch.randn(4, 4, 8, 8)
    before = sampler.denoiser_calls
    sampler.probe(PROMPTS, [(500.0, x), (100.0, x)], lambda view: view.x0.square().mean().backward())
    assert sampler.denoiser_calls - before == 2
    assert gradients(sampler.policy)


# -- backprop ----------------------------------------------------------------------------------------------------


def test_backprop_draws_the_rollouts_images_and_reaches_the_weights(kind: str) -> None:
    sampler = make(kind)
    traj = sampler.rollout(PROMPTS, seed=2)
    images = sampler.backprop(PROMPTS, seed=2)
    torch.testing.assert_close(images.detach(), traj.images, atol=1e-6, rtol=0)
    images.sum().backward()
    silent = [name for name, grad in gradients(sampler.policy).items() if not float(grad.norm()) > 0]
    # SD3's last block throws the text stream's output away, so its text queries have no effect at all.
    assert all("transformer_blocks.1.attn.add_q_proj" in name for name in silent)


def test_backprop_is_the_derivative_and_checkpointing_changes_nothing(kind: str) -> None:
    sampler = make(kind, steps=3)
    sampler.policy.pipe.to(torch.float64)
    for parameter in sampler.policy.parameters():
        parameter.data = parameter.data.double()
    weight = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    results = []
    for checkpointing in (True, False):
        (sampler.backprop(PROMPTS[:2], checkpointing=checkpointing) * weight).sum().backward()
        results.append(gradients(sampler.policy))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])
    name, parameter = max(sampler.policy.named_parameters().items(), key=lambda item: float(results[0][item[0]].norm()))
    direction = results[0][name] / results[0][name].norm()
    values = []
    for sign in (1, -1):
        parameter.data += sign * 1e-4 * direction
        with torch.no_grad():
            values.append(float((sampler.backprop(PROMPTS[:2]).detach().double() * weight).sum()))
        parameter.data -= sign * 1e-4 * direction
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(float(results[0][name].norm()), rel=2e-2)


def test_truncation_differentiates_the_chosen_steps_only(kind: str) -> None:
    sampler = make(kind)
    full = sampler.backprop(PROMPTS, seed=2)
    last = sampler.backprop(PROMPTS, seed=2, grad_steps=[4])
    torch.testing.assert_close(last.detach(), full.detach(), atol=1e-6, rtol=0)
    last.sum().backward()
    truncated = gradients(sampler.policy)
    full.sum().backward()
    whole = gradients(sampler.policy)
    assert any(not torch.allclose(truncated[n], whole[n], rtol=1e-3) for n in truncated)


# -- the gate ----------------------------------------------------------------------------------------------------


def test_parity_passes_on_an_untouched_run(kind: str) -> None:
    sampler = make(kind)
    report = sampler.check_parity(sampler.rollout(PROMPTS))
    assert report["max_ratio_error"] == 0
    assert report["steps"] == (5 if kind == "sd" else 4)
    assert report["layers_reached"] > 0 and all(p.grad is None for p in sampler.policy.parameters())


def _store_in_bf16(sampler: Sampler, traj: Trajectory) -> Trajectory:
    return dataclasses.replace(traj, states=traj.states.bfloat16().float())


def _dropout(sampler: Sampler, traj: Trajectory) -> Trajectory:
    module = next(iter(sampler.policy.denoisers.values()))
    module.register_forward_pre_hook(lambda m, a: (nn.functional.dropout(a[0], 0.1), *a[1:]) if a else None)
    module.register_forward_hook(
        lambda m, a, out: tuple(nn.functional.dropout(o, 0.1) if torch.is_tensor(o) else o for o in out)
    )
    return traj


def _no_guidance(sampler: Sampler, traj: Trajectory) -> Trajectory:
    sampler._fixed["guidance_scale"] = 1.0
    return traj


def _wrong_sigma(sampler: Sampler, traj: Trajectory) -> Trajectory:
    sampler._puppet._difftune.eta *= 1.01
    return traj


@pytest.mark.parametrize("mutant", [_store_in_bf16, _dropout, _no_guidance, _wrong_sigma])
def test_the_gate_catches_mutants(kind: str, mutant: Callable[[Sampler, Trajectory], Trajectory]) -> None:
    sampler = make(kind)
    traj = mutant(sampler, sampler.rollout(PROMPTS))
    with pytest.raises(ParityError, match="parity: .*step"):
        sampler.check_parity(traj)


def test_the_gate_catches_gradients_that_go_nowhere() -> None:
    sampler = make("sd")
    traj = sampler.rollout(PROMPTS)
    sampler.policy.pipe.vae.requires_grad_(True)
    sampler.check_parity(traj)  # the decoder is not in the replay, so nothing reaches it
    sampler.policy.pipe.unet.conv_in.weight.requires_grad_(True)
    policy = sampler.policy
    named = {n: p for n, p in policy.named_parameters().items() if "lora" in n}
    policy.named_parameters = lambda: named  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="gradients reach unet.conv_in.weight"):
        sampler.check_parity(traj)


# -- pipelines of the user's own ---------------------------------------------------------------------------------


class Dots(diffusers.DiffusionPipeline):
    """A pipeline of a user's own: its own denoiser, vectors as latents, no decoder to speak of."""

    def __init__(self, brain: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(brain=brain, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
        x = torch.stack([torch.randn(12, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.brain(x, t), t, x).prev_sample
        return (torch.sigmoid(x).reshape(-1, 3, 2, 2),)


class Brain(nn.Module):
    """A denoiser with nothing of diffusers in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(13, 16)
        self.outer = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = (t / 1000).expand(len(x), 1).to(x)
        return self.outer(torch.tanh(self.inner(torch.cat([x, time], 1))))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_a_pipeline_of_the_users_own_works(lora: LoraConfig | None, scheduler: Any) -> None:
    sampler = Sampler(Policy(Dots(Brain(), scheduler()), lora), steps=4, eta=0.5)
    traj = sampler.rollout(["x", "y"])
    assert traj.states.shape == (2, 5, 12)
    report = sampler.check_parity(traj)
    assert report["max_ratio_error"] == 0 and report["layers_reached"] == report["layers"]


def test_inference_mode_is_unwrapped() -> None:
    class Strict(Dots):
        __call__ = torch.inference_mode()(Dots.__call__.__wrapped__)  # type: ignore[attr-defined]

    sampler = Sampler(Policy(Strict(Brain(), diffusers.DDIMScheduler()), LoraConfig(rank=2)), steps=4)
    assert sampler.check_parity(sampler.rollout(["x"]))["max_ratio_error"] == 0


def test_images_are_understood_in_every_form() -> None:
    import numpy as np
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    for value in (array, [Image.fromarray(a) for a in array], (expected,), expected.half().double()):
        torch.testing.assert_close(to_images(value, 2), expected, atol=1e-3, rtol=0)
    video = to_images(np.stack([array] * 3, 1), 2)
    assert video.shape == (2, 3, 3, 8, 8)
    with pytest.raises(UserError, match="expected images or frames"):
        to_images({"nothing": 1}, 2)


def test_lcm_steps_outside_the_window_keep_the_noise_level() -> None:
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    sampler = Sampler(Policy(tiny.sd_pipeline(scheduler), LoraConfig(rank=2)), steps=4, window=[0])
    seen = []
    transition = Prediction.transition

    def watch(self: Prediction, noisy: bool = True) -> Any:
        step = transition(self, noisy)
        seen.append((self.index, noisy, step, self))
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prediction, "transition", watch)
        traj = sampler.rollout(PROMPTS)
    assert traj.stochastic_steps == [0]
    for index, noisy, step, prediction in seen:
        if not noisy and index < 3:
            expected = prediction.nxt.alpha * prediction.x0 + prediction.nxt.sigma * prediction.noise
            torch.testing.assert_close(step.mean, expected)


def test_the_prompt_cache_holds_a_bounded_number_of_bytes() -> None:
    pipe = tiny.sd_pipeline()
    cache = PromptCache(pipe, capacity=3 * 2 * 8 * 16 * 4)  # three prompts: embeddings with and without the text
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with cache.open():
        for prompt in ("a", "b", "c", "d", "a"):
            before = len(calls)
            pipe.encode_prompt([prompt], torch.device("cpu"), 1, True)
            made = len(calls) - before
            assert made > 0, "the first was dropped for the fourth"
        before = len(calls)
        pipe.encode_prompt(["d"], torch.device("cpu"), 1, True)
        assert len(calls) == before
