"""How much a run costs beyond its denoiser: ``python -m difftune.bench``.

Time: a whole epoch (rollout, decode, score, update) over the bare denoiser calls that this epoch makes, the same
tensors forward, and forward and backward, with nothing around them. Both are measured in turn in one process, and the
medians are compared, so that a machine whose speed drifts does not matter. Memory: the peak of a process that trains
one epoch, against the number of steps, each in a process of its own; and, free of what the process holds anyway, the
peak of all tensors that are alive at once (``--tensors``).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from difftune.algorithm import build_algorithm
from difftune.policy import LoraConfig, Policy, load_pipeline
from difftune.sampler import Sampler
from difftune.trainer import Trainer

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "ddpo": ({"normalize": "batch"}, "jpeg_compressibility"),
    "rdp": ({}, "jpeg_compressibility"),
    "alignprop": ({"truncation": "fixed", "truncation_steps": 1}, "jpeg_proxy"),
}
"""Algorithms whose memory is measured, their settings and rewards."""

PROMPTS = ["", "two stars", "a red circle", "a dotted background"]


def build(model: str, steps: int, samples: int = 64) -> Trainer:
    """Return a trainer of the shape the demo has: guided, half of the steps trained, two updates an epoch."""
    policy = Policy(load_pipeline(model), LoraConfig(rank=8))
    sampler = Sampler(policy, steps=steps, guidance_scale=3.0, eta=1.0 if model.endswith("sd") else 0.7, batch_size=32)
    return Trainer(
        policy=policy,
        sampler=sampler,
        algorithm=build_algorithm("ddpo", normalize="batch", timestep_fraction=0.5),
        reward="jpeg_compressibility",
        prompts=PROMPTS,
        epochs=10_000,
        prompts_per_epoch=samples // 4,
        samples_per_prompt=4,
        micro_batch=32,
    )


class Calls:
    """Records a denoiser's calls, and repeats them bare."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward = module.forward
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = []

    def record(self) -> None:
        """Keep the arguments of every call from now on."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((args, kwargs, torch.is_grad_enabled()))
            return self._forward(*args, **kwargs)

        self._module.forward = forward

    def stop(self) -> None:
        """Stop keeping."""
        self._module.forward = self._forward

    def repeat(self) -> float:
        """Make the recorded calls again, backward too where gradients were on; return the seconds it took."""
        started = time.perf_counter()
        for args, kwargs, grad in self._calls:
            with torch.set_grad_enabled(grad):
                out = self._forward(*args, **kwargs)
            if grad:
                sample: Tensor = out[0] if isinstance(out, tuple) else out.sample
                sample.backward(torch.ones_like(sample))
        took = time.perf_counter() - started
        for parameter in self._module.parameters():
            parameter.grad = None
        return took

    def __len__(self) -> int:
        return len(self._calls)


def overhead(model: str, steps: int = 10, rounds: int = 5) -> dict[str, Any]:
    """Return the median seconds of an epoch, of its bare denoiser calls, their ratio, and the phases' shares."""
    trainer = build(model, steps)
    epochs = iter(trainer)
    next(epochs)  # the first has the parity gate and the prompt cache to fill
    calls = Calls(next(iter(trainer.policy.denoisers.values())))
    calls.record()
    next(epochs)
    calls.stop()
    whole, bare, phases = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        metrics = next(epochs)
        whole.append(time.perf_counter() - started)
        phases.append(dict(metrics.seconds))
        bare.append(calls.repeat())
    median = statistics.median
    return {
        "model": model,
        "steps": steps,
        "denoiser_calls": len(calls),
        "epoch_seconds": median(whole),
        "bare_seconds": median(bare),
        "ratio": median(w / b for w, b in zip(whole, bare, strict=True)),
        "phases": {name: median(p[name] for p in phases) for name in phases[0]},
    }


def peak_memory(model: str, steps: int) -> float:
    """Return the peak memory in MiB of a fresh process that trains one epoch at ``steps`` steps."""
    command = [sys.executable, "-m", "difftune.bench", "--model", model, "--one-epoch", str(steps)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.strip().splitlines()[-1])


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are created while it is on and alive at once: ``peak`` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._views: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and take down the memory that its results own."""
        out = func(*args, **(kwargs or {}))
        if func not in self._views:
            self._views[func] = any(returned.alias_info is not None for returned in func._schema.returns)
        if not self._views[func]:
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, Tensor):
                    self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self._alive -= size


def peak_tensors(method: str, model: str, steps: int, samples: int = 2) -> float:
    """Return the most MiB of tensors alive at once, the model's own not counted, while an epoch is trained."""
    settings, reward = METHODS[method]
    policy = Policy(load_pipeline(model), LoraConfig(rank=8))
    eta = 1.0 if model.endswith("sd") else 0.7
    trainer = Trainer(
        policy=policy,
        sampler=Sampler(policy, steps=steps, guidance_scale=1.0, eta=eta, batch_size=samples),
        algorithm=build_algorithm(method, **settings),
        reward=reward,
        prompts=PROMPTS,
        prompts_per_epoch=samples // 2,
        samples_per_prompt=2,
        updates_per_epoch=1,
        micro_batch=samples,
    )
    with LiveTensors() as live:
        next(iter(trainer))
    return live.peak / 2**20


def main() -> None:
    """Print the figures as a table, and as JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", help="default: difftune/tiny-sd and difftune/tiny-flow")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-steps", type=int, nargs="*", default=[5, 10, 20, 40])
    parser.add_argument("--tensors", type=int, nargs="+", default=None, metavar="STEPS", help="live tensors alone")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one-epoch", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    if options.threads:
        torch.set_num_threads(options.threads)
    models = options.model or ["difftune/tiny-sd", "difftune/tiny-flow"]
    if options.one_epoch is not None:
        next(iter(build(models[0], options.one_epoch)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if options.tensors:
        for model in models:
            for method in METHODS:
                peaks = {steps: peak_tensors(method, model, steps) for steps in options.tensors}
                print(f"{model}, {method}, MiB by steps: " + ", ".join(f"{k}: {v:.2f}" for k, v in peaks.items()))
        return
    results = []
    for model in models:
        result = overhead(model, rounds=options.rounds)
        result["peak_mib"] = {steps: peak_memory(model, steps) for steps in options.memory_steps}
        results.append(result)
        if not options.json:
            print(
                f"{model}: epoch {result['epoch_seconds']:.2f} s, bare denoiser {result['bare_seconds']:.2f} s "
                f"({result['denoiser_calls']} calls), ratio {result['ratio']:.3f}"
            )
            print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["phases"].items()))
            print("  peak MiB by steps: " + ", ".join(f"{k}: {v:.0f}" for k, v in result["peak_mib"].items()))
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
