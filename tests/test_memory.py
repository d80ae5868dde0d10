"""Memory and speed settings: each does what it says, composes, and leaves the ratios at 1."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import ModelMixin
from pipelines.flux import flux
from torch import nn

import difftune as dt
from difftune import config as cf
from difftune import memory
from difftune.policy import LoraConfig, Policy, load_pipeline
from difftune.sampler import Sampler
from difftune.trainer import Trainer
from difftune.types import UserError
from difftune.zoo.world import render, sample_scene

PROMPTS = ["a cat", "two star"]
MINIMAL: dict[str, Any] = {
    "model": "difftune/tiny-sd",
    "reward": "jpeg_compressibility",
    "algorithm": "ddpo",
    "prompts": ["a", "b"],
}


def drawn(pipe: Any, **settings: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Pictures of a fresh adapter, and the gate's figures."""
    torch.manual_seed(0)
    policy = Policy(pipe, LoraConfig(rank=2), **settings)
    sampler = Sampler(policy, steps=2, guidance_scale=2.0, eta=0.7, height=16, width=16)
    trajectory = sampler.rollout(PROMPTS)
    assert trajectory.images is not None
    return trajectory.images, sampler.check_parity(trajectory)


def short_flux() -> Any:
    made = flux("FluxPipeline", guided=True)
    made.difftune_call = {"max_sequence_length": 8}
    return made


def refused(**changes: Any) -> str:
    with pytest.raises(UserError) as error:
        cf.validate({**MINIMAL, **changes})
    assert "\n" not in str(error.value)
    return str(error.value)


# -- attention -----------------------------------------------------------------------------------------------------


def test_kernels_by_the_dispatcher_give_the_same_pictures_and_ratio_1() -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    found = {}
    before = _AttentionBackendRegistry.get_active_backend()
    for name in ("auto", "sdpa", "math"):
        loaded = load_pipeline(short_flux(), attention=name)
        kernels = {str(block.attn.processor._attention_backend) for block in loaded.transformer.transformer_blocks}
        images, figures = drawn(loaded)
        assert figures["max_ratio_error"] == 0
        found[name] = (kernels, images)
    assert [len(kernels) for kernels, _ in found.values()] == [1, 1, 1]
    assert "None" in found["auto"][0] and found["sdpa"][0] != found["math"][0]
    assert torch.equal(found["auto"][1], found["sdpa"][1])
    assert float((found["math"][1] - found["sdpa"][1]).abs().max()) < 1e-5
    # diffusers' own setting is left as it was: other models of the process keep their kernels.
    assert _AttentionBackendRegistry.get_active_backend() == before


def test_a_kernel_that_is_not_there_is_one_line() -> None:
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(UserError, match=r"^model.attention: flash needs flash_attn, .* pip install flash-attn$"):
            memory.require("model.attention", "flash", "cuda")
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(UserError, match=r"^model.attention: xformers needs xformers, .*difftune\[xformers\]"):
            memory.require("model.attention", "xformers", "cuda")
    with pytest.raises(UserError, match="model.attention: cudnn runs on CUDA GPUs only, and the run computes on cpu"):
        memory.require("model.attention", "cudnn", "cpu")
    # A package that is found and cannot be used: diffusers says so.
    with pytest.raises(UserError, match="model.attention: flash cannot be used by FluxTransformer2DModel"):
        load_pipeline(flux("FluxPipeline"), attention="flash")
    with pytest.raises(UserError, match="UNet2DConditionModel knows sdpa and xformers only, got math; choose sdpa"):
        load_pipeline(tiny.sd_pipeline(), attention="math")


def test_a_setting_that_this_machine_lacks_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difftune.config.objects.load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr("difftune.config.objects.load_reward", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(memory.shutil, "which", lambda name: None)
    model = {"id": "difftune/tiny-sd", "dtype": "bf16"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {**model, "attention": "flash"}}, "flash needs flash_attn"),
        ({"model": {**model, "quantize": "torchao-int8"}}, r"torchao, which is not installed: .*difftune\[quant\]"),
        ({"compile": "full", "device": "cpu"}, r"needs a C\+\+ compiler"),
    ]
    for changes, line in cases:
        with pytest.raises(UserError, match=line) as error:
            cf.build(cf.validate({**MINIMAL, **changes}))
        assert "\n" not in str(error.value)


# -- compilation ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What a denoiser repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).cos()


class Blocks(nn.Module):
    """Two blocks of one kind."""

    _repeated_blocks = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sin()

    def compile_repeated_blocks(self, **options: Any) -> None:
        ModelMixin.compile_repeated_blocks(self, **options)


def tracer(traced: list[str]) -> Any:
    """A compiler that takes down the operations it is given and generates no code."""

    def compiler(graph: Any, inputs: Any) -> Any:
        traced.append(" ".join(str(node.target) for node in graph.graph.nodes if node.op.startswith("call")))
        return graph

    return compiler


@pytest.mark.parametrize("how", ["full", "blocks"])
def test_what_is_compiled_is_the_whole_or_its_blocks(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    monkeypatch.setattr(memory, "COMPILER", tracer(traced))
    module, x = Blocks(), torch.randn(2, 3)
    expected = module(x)
    memory.compile_denoiser(module, how)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected) and module(x).requires_grad
    assert ("sin" in traced[0]) == (how == "full") and len(traced) >= 2, "without gradients and with"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("sd3", "full"), ("flux", "blocks")])
def test_a_compiled_denoiser_keeps_ratio_1(kind: str, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch's tracer; what the code generator adds is rounding (see the next test)."""
    traced: list[str] = []
    monkeypatch.setattr(memory, "COMPILER", tracer(traced))
    make = short_flux if kind == "flux" else tiny.sd3_pipeline
    plain, _ = drawn(make())
    assert not traced
    images, figures = drawn(make(), compile=how)
    assert len(traced) >= 2 and figures["max_ratio_error"] <= 1e-6 and figures["layers_reached"] > 0
    assert torch.allclose(images, plain, atol=1e-5)


def test_blocks_are_compiled_only_where_the_model_names_them() -> None:
    with pytest.raises(UserError, match="compile: Linear names no repeated blocks; set compile: full"):
        memory.compile_denoiser(nn.Linear(2, 2), "blocks")


@pytest.mark.slow
def test_generated_code_rounds_differently_with_gradients_and_stays_within_1e_6() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    _, figures = drawn(short_flux(), compile="blocks")
    assert figures["max_ratio_error"] <= 1e-6


# -- the autoencoder -----------------------------------------------------------------------------------------------


def test_tiles_and_slices_give_the_same_pictures_within_a_bound() -> None:
    rngs = map(np.random.default_rng, range(4))
    scenes = torch.stack([torch.from_numpy(np.array(render(sample_scene(rng)))) for rng in rngs])
    top, bottom = scenes.movedim(-1, 1).float().div(127.5).sub(1).split(2)
    # Twice the size that the autoencoder knows, which is a tile's.
    pictures = torch.cat([torch.cat([*top], -1), torch.cat([*bottom], -1)], -2)[None].repeat(2, 1, 1, 1)

    def decoded(latents: torch.Tensor, **settings: Any) -> torch.Tensor:
        with torch.no_grad():
            return load_pipeline("difftune/tiny-sd", **settings).vae.decode(latents).sample

    with torch.no_grad():
        latents = load_pipeline("difftune/tiny-sd").vae.encode(pictures).latent_dist.mode()
    whole, part = decoded(latents), latents[:, :, :16, :16]
    assert torch.allclose(decoded(latents, vae_slicing=True), whole, atol=1e-5)
    assert torch.equal(decoded(part, vae_tiling=True), decoded(part)), "what fits into one tile is not cut"
    tiled = decoded(latents, vae_tiling=True)
    assert not torch.equal(tiled, whole)
    assert float((tiled - whole).abs().mean()) < 0.1 * float(whole.std())


def test_an_autoencoder_that_cannot_is_refused() -> None:
    pipe = tiny.sd_pipeline()
    pipe.vae = nn.Linear(2, 2)
    with pytest.raises(UserError, match="model.vae_tiling: Linear has no tiling; leave it out"):
        load_pipeline(pipe, vae_tiling=True)


# -- what is idle --------------------------------------------------------------------------------------------------


class Moves(nn.Module):
    """A module that takes down where it is sent, in place of going there."""

    def __init__(self, log: list[str], inner: nn.Module) -> None:
        super().__init__()
        self.log, self.inner, self.config = log, inner, inner.config
        self.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append(str(args[0]))
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append("encode")
        return self.inner(*args, **kwargs)


def test_idle_encoders_are_on_the_device_while_they_encode_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = drawn(tiny.sd_pipeline())
    log: list[str] = []
    pipe = tiny.sd_pipeline()
    pipe.text_encoder = Moves(log, pipe.text_encoder)
    torch.manual_seed(0)
    policy = Policy(pipe, LoraConfig(rank=2), idle_encoders=True)
    # The same device under another name, so that it shows in the log.
    policy.to("cpu:0")
    assert log == ["cpu"], "at rest from the beginning"
    sampler = Sampler(policy, steps=2, guidance_scale=2.0, eta=0.7, height=16, width=16)
    tap = sampler._tap._tapped

    def watched(name: str, forward: Any, *rest: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            log.append("denoise")
            return forward(*args, **kwargs)

        return tap(name, noted, *rest)

    monkeypatch.setattr(sampler._tap, "_tapped", watched)
    images = sampler.rollout(PROMPTS).images
    assert log[1] == "cpu:0" and log[2] == "encode"
    rested = log.index("cpu", 1)
    assert "denoise" not in log[:rested] and "encode" not in log[rested:] and "cpu:0" not in log[rested:]
    assert images is not None and torch.equal(images, expected)
    # Cached prompts wake nobody.
    del log[:]
    sampler.rollout(PROMPTS)
    assert set(log) == {"denoise"}
    # Moved once more, an encoder has one hook, not two.
    policy.to("cpu:0")
    del log[:]
    sampler.rollout(["green dog"])
    assert log.count("cpu") == 1


def test_idle_rewards_are_on_the_device_while_they_score() -> None:
    log: list[str] = []

    def to(self: Any, device: Any) -> Any:
        log.append(str(device))
        return self

    made: Any = dt.build_reward("jpeg_compressibility")
    made.__class__ = type("Moved", (type(made),), {"to": to})
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    sampler = Sampler(policy, steps=2, eta=1.0, height=16, width=16)
    settings: dict[str, Any] = {"epochs": 1, "prompts_per_epoch": 1, "samples_per_prompt": 2, "updates_per_epoch": 1}
    algorithm = dt.build_algorithm("ddpo", normalize="batch")
    trainer = Trainer(
        policy=policy, sampler=sampler, algorithm=algorithm, reward=made, prompts=["a"], idle_rewards=True, **settings
    )
    assert log == ["cpu"]
    list(trainer)
    assert log == ["cpu", str(trainer.accelerator.device), "cpu"]


# -- quantised weights ---------------------------------------------------------------------------------------------


def test_parts_become_components_of_their_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_quantized", lambda how, library, dtype: (how, library))
    monkeypatch.setattr("diffusers.PipelineQuantizationConfig", lambda quant_mapping: quant_mapping)
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "image_encoder": [None, None],
    }

    def parts(**given: Any) -> Any:
        return memory.quantization(index, given, torch.bfloat16, lambda name: name == "transformer")

    assert parts(denoiser="bnb-4bit") == {"transformer": ("bnb-4bit", "diffusers")}
    assert parts(denoiser="bnb-8bit", text_encoders="bnb-4bit") == {
        "transformer": ("bnb-8bit", "diffusers"),
        "text_encoder_3": ("bnb-4bit", "transformers"),
    }
    del index["text_encoder_3"]
    assert parts(text_encoders="bnb-4bit") is None, "CLIP's encoders are left alone"
    with pytest.raises(UserError, match="model.quantize: the model has no denoiser among text_encoder"):
        memory.quantization(index, {"denoiser": "bnb-4bit"}, torch.bfloat16, lambda name: False)


def test_int8_weights_by_torchao_train_with_ratio_1() -> None:
    pytest.importorskip("torchao")
    plain = load_pipeline("difftune/tiny-flow")
    pipe = load_pipeline("difftune/tiny-flow", quantize={"denoiser": "torchao-int8"})
    assert "Int8" in type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__
    expected, _ = drawn(plain)
    images, figures = drawn(pipe)
    assert figures["max_ratio_error"] == 0 and figures["layers_reached"] > 0
    assert 0 < float((images - expected).abs().max()) < 0.1


# -- memory that is exhausted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(5), False),
        (ValueError("CUDA out of memory. Tried"), False),
        (UserError(memory.out_of_memory("a rollout", 1, RuntimeError("CUDA out of memory. Tried"))), False),
    ],
)
def test_memory_is_exhausted_by_any_backends_word(error: Exception, exhausted: bool) -> None:
    assert memory.is_exhausted(error) is exhausted


def run_of(
    fits: int, algorithm: Any = None, error: type[Exception] = torch.OutOfMemoryError, **settings: Any
) -> Trainer:
    """A run on a device whose memory holds ``fits`` samples with gradients, fewer than that never fail."""
    torch.manual_seed(0)
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    sampler = Sampler(policy, steps=2, eta=1.0, height=16, width=16)
    sizes = {"epochs": 1, "prompts_per_epoch": 4, "samples_per_prompt": 2, "updates_per_epoch": 2, "micro_batch": 4}
    algorithm = algorithm or dt.build_algorithm("ddpo", normalize="batch", lr=1e-2)
    trainer = Trainer(
        policy=policy, sampler=sampler, algorithm=algorithm, reward="jpeg_compressibility", prompts=PROMPTS,
        **{**sizes, **settings},
    )  # fmt: skip
    accumulate = trainer.algorithm.accumulate

    def limited(batch: Any, context: Any) -> dict[str, float]:
        # The work is done, and its gradients are there, when the memory gives out.
        found = accumulate(batch, context)
        if len(batch) > fits:
            raise error("CUDA out of memory. Tried to allocate 2 GiB.")
        return found

    trainer.algorithm.accumulate = limited  # type: ignore[method-assign]
    return trainer


def test_an_exhausted_memory_halves_the_micro_batch_and_takes_the_same_step() -> None:
    plain, short = run_of(fits=8), run_of(fits=1, error=RuntimeError)
    (expected,) = list(plain)
    with pytest.warns(UserWarning, match="out of memory: train.micro_batch is") as told:
        (metrics,) = list(short)
    lines = [str(one.message) for one in told]
    assert [line.split(" from")[0][-1] for line in lines] == ["2", "1"] and all("\n" not in line for line in lines)
    assert short.step == plain.step == 2
    for name, value in plain.policy.named_parameters().items():
        torch.testing.assert_close(short.policy.named_parameters()[name], value, atol=2e-4, rtol=0)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert short.config.micro_batch == 4, "the run's configuration is what it was"


def test_halving_begins_at_what_was_tried_and_failed_attempts_cost_no_passes() -> None:
    (expected,) = list(run_of(fits=8, micro_batch=2))
    with pytest.warns(UserWarning, match="train.micro_batch is 2 from here on") as told:
        (metrics,) = list(run_of(fits=2, micro_batch=64))
    assert len(told) == 1, "a minibatch has 4 samples: 32, 16, 8 and 4 are no attempts"
    for name in ("denoiser_calls", "denoiser_rows"):
        assert metrics[name] == expected[name]


def test_what_a_failed_attempt_remembered_is_forgotten() -> None:
    def value_net(fits: int) -> Any:
        run = run_of(fits, dt.build_algorithm("dpok", baseline="value", lr=1e-2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            list(run)
        return run.algorithm.state_dict()["value"]

    assert len(value_net(2)["targets"]) == len(value_net(8)["targets"])


def test_what_cannot_be_halved_is_one_line_of_remedies() -> None:
    with pytest.warns(UserWarning), pytest.raises(UserError) as error:
        list(run_of(fits=0))
    line = str(error.value)
    assert line.startswith("out of memory in a micro-batch of 1 (CUDA out of memory") and "\n" not in line
    assert "gradient_checkpointing: true" in line and "preset" in line
    # A pair is never cut.
    pairs = dt.build_algorithm("d3po")
    with pytest.raises(UserError, match="in a micro-batch of 2 "):
        list(run_of(fits=1, algorithm=pairs, micro_batch=2))


def test_a_rollout_that_does_not_fit_is_drawn_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampler() -> Sampler:
        torch.manual_seed(0)
        policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
        return Sampler(policy, steps=2, eta=1.0, height=16, width=16, batch_size=4)

    prompts = ["a", "b", "c", "d", "e"]
    expected = sampler().rollout(prompts)
    record = Sampler._record
    sizes: list[int] = []

    def limited(self: Sampler, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            record(self, prompts, *rest)
            raise RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)")
        return record(self, prompts, *rest)

    monkeypatch.setattr(Sampler, "_record", limited)
    short = sampler()
    with pytest.warns(UserWarning, match="sampler.batch_size is 2 from here on"):
        trajectory = short.rollout(prompts)
    assert sizes == [4, 2, 2, 1] and short.batch_size == 2
    torch.testing.assert_close(trajectory.states, expected.states, atol=1e-4, rtol=0)
    before = short.denoiser_calls
    short.batch_size = 16
    with pytest.warns(UserWarning, match="sampler.batch_size is 2 from here on"):
        short.rollout(prompts)
    assert sizes[4:] == [5, 2, 2, 1] and short.denoiser_calls - before == before
    with pytest.raises(UserError, match="out of memory in a rollout of 4 "):
        fixed = sampler()
        fixed.shrinks = False
        fixed.rollout(prompts)


def gated(monkeypatch: pytest.MonkeyPatch, fits: int, **settings: Any) -> tuple[Trainer, list[int]]:
    """A run whose parity gate fits with ``fits`` samples at most, and the sizes that it tried."""
    run, sizes, check = run_of(fits=8, **settings), [], Sampler.check_parity

    def limited(self: Sampler, trajectory: Any, *rest: Any) -> Any:
        sizes.append(len(trajectory))
        found = check(self, trajectory, *rest)
        if len(trajectory) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return found

    monkeypatch.setattr(Sampler, "check_parity", limited)
    return run, sizes


def test_a_parity_gate_that_does_not_fit_looks_at_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    run, sizes = gated(monkeypatch, fits=2)
    with pytest.warns(UserWarning, match="out of memory: the parity gate looks at [24] samples at once"):
        list(run)
    assert sizes == [8, 4, 2] and run.sampler.batch_size == 16 and run._micro_batch == 4
    assert run.parity is not None and run.parity["max_ratio_error"] == 0


def test_a_parity_gate_of_one_sample_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = gated(monkeypatch, fits=0)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"^out of memory in the parity gate of 1 \(CUDA"):
        list(run)


def test_the_gate_draws_anew_what_was_drawn_in_batches_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    run, sizes = gated(monkeypatch, fits=8)
    run.sampler.batch_size = 4
    record, seen = Sampler._record, []

    def limited(self: Sampler, prompts: Any, *rest: Any) -> Any:
        seen.append(len(prompts))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        drawn = record(self, prompts, *rest)
        if len(prompts) == 2:
            return drawn
        # Another batch size rounds differently, on some kernels.
        return dataclasses.replace(drawn, log_probs=drawn.log_probs + 1e-3)

    monkeypatch.setattr(Sampler, "_record", limited)
    with pytest.warns(UserWarning):
        list(run)
    # Four, then memory gives out: two and two; the gate's own two are new.
    assert seen == [4, 4, 2, 2, 2] and sizes == [2]
    assert run.parity is not None and run.parity["max_ratio_error"] == 0


# -- what goes together --------------------------------------------------------------------------------------------


def test_what_excludes_one_another_is_one_line() -> None:
    model = {"id": "difftune/tiny-sd"}
    assert "quantised weights cannot be trained" in refused(lora=None, model={**model, "quantize": "torchao-int8"})
    assert "needs a CUDA GPU" in refused(device="cpu", model={**model, "quantize": {"denoiser": "bnb-4bit"}})
    assert "computes in half precision" in refused(model={**model, "attention": "flash"})
    assert "compile: not tried with train.sharding: fsdp" in refused(compile="full", train={"sharding": "fsdp"})
    gradient = {"algorithm": {"name": "alignprop"}, "reward": "jpeg_proxy", "offload": ["reward"]}
    assert "leave reward out of offload" in refused(**gradient)
    assert "did you mean 'bnb-4bit'" in refused(model={**model, "quantize": "bnb-4bits"})
    assert "expected 'text_encoders' or 'reward'" in refused(offload=["vae"])


@pytest.mark.slow
def test_settings_compose_in_one_run(tmp_path: Path) -> None:
    sizes = {"epochs": 1, "prompts_per_epoch": 2, "samples_per_prompt": 1, "updates_per_epoch": 1, "sample_every": 0}
    model = {"id": "difftune/tiny-sd", "attention": "sdpa", "vae_tiling": True, "vae_slicing": True}
    settings = {
        "model": model, "offload": ["text_encoders", "reward"], "gradient_checkpointing": True, "train": sizes,
        "sampler": {"steps": 2}, "device": "cpu",
    }  # fmt: skip
    run = cf.build(cf.validate({**MINIMAL, **settings}))
    trainer = run.trainer(out=tmp_path / "run")
    (metrics,) = list(trainer)
    assert trainer.parity is not None and trainer.parity["max_ratio_error"] == 0
    assert metrics["ratio"] == 1


# -- presets -------------------------------------------------------------------------------------------------------


def test_a_preset_fills_in_what_its_place_leaves_open(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "model: difftune/tiny-sd\nreward: jpeg_compressibility\nalgorithm: ddpo\nprompts: [a, b]\n"
        "preset: 24GB\nsampler: {batch_size: 3}\n"
    )
    config = cf.load_config(file)
    # The file's own batch size stands beside its preset; the rest comes from the preset.
    assert (config.sampler.batch_size, config.train.micro_batch, config.model.dtype) == (3, 2, "bf16")
    assert config.model.id == "difftune/tiny-sd" and config.model.vae_slicing and not config.model.vae_tiling
    # The command line's goes before the file, and what else the command line says before that, in any order.
    config = cf.load_config(file, ["train.micro_batch=5", "preset=8GB"])
    assert (config.sampler.batch_size, config.train.micro_batch, config.preset) == (1, 5, "8GB")
    assert config.model.quantized_parts == {"denoiser": "bnb-4bit", "text_encoders": "bnb-4bit"}
    assert cf.validate(cf.parse_yaml(cf.to_yaml(cf.resolve(config)), "x")) == config
    with pytest.raises(UserError, match="preset: got '9GB', expected '8GB', '12GB', '24GB' or '80GB'"):
        cf.load_config(file, ["preset=9GB"])


def test_every_preset_goes_with_recipes_for_real_models() -> None:
    from difftune.config.memory_presets import PRESETS

    for name in ("ddpo-compressibility-sd15", "ddpo-compressibility-sd35"):
        recipe = cf.load_config(name)
        for preset in PRESETS:
            config = cf.load_config(name, [f"preset={preset}"])
            assert config.train.micro_batch == PRESETS[preset]["train"]["micro_batch"]
            # Nothing but the base's precision alters results.
            changed = cf.changed_keys(cf.resolve(recipe), cf.resolve(config))
            assert set(changed) <= {"model.dtype", "model.vae_tiling", *(k for k in changed if "quantize" in k)}


def test_a_preset_leaves_a_differentiated_reward_beside_the_model() -> None:
    gradient = {**MINIMAL, "algorithm": "alignprop", "reward": "jpeg_proxy", "preset": "24GB"}
    assert cf.validate(gradient).offload == ["text_encoders"]
    assert cf.validate({**MINIMAL, "preset": "24GB"}).offload == ["text_encoders", "reward"]


def test_a_preset_of_the_command_line_knows_the_algorithm_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "model: difftune/tiny-sd\nreward: jpeg_proxy\nalgorithm: ddpo\nprompts: [a, b]\noffload: [reward]\n"
    )
    overrides = ["preset=24GB", "algorithm=alignprop"]
    for given in (overrides, overrides[::-1]):
        assert cf.load_config(file, given).offload == ["text_encoders"]
        assert cf.load_config(file, [*given, "offload=[]"]).offload == []
    assert cf.load_config(file, ["preset=24GB"]).offload == ["text_encoders", "reward"]
    assert cf.load_config(file, ["preset=80GB"]).offload == []
    assert cf.load_config(file, ["preset=null"]).offload == ["reward"]
