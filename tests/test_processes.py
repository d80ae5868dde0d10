"""Two real processes over gloo: they equal one, stop together, write once and resume to the bit."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from difftune.algorithm import build_algorithm
from difftune.checkpoint import checkpoints, load_checkpoint
from difftune.monitor import Monitor, MonitorAlarm, MonitorConfig
from difftune.policy import LoraConfig, Policy
from difftune.processes import Processes, even_shares
from difftune.reward import FunctionReward, Reward, build_reward
from difftune.sampler import Sampler
from difftune.trainer import Trainer
from difftune.types import SampleKey, UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: importing torch anew costs seconds")

PROMPTS = ["a red cat", "two dog", "a star"]


# -- running two processes -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, port: int) -> dict[str, str]:
    """What a launcher tells each of two processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Raised:
    """What a process ended with in place of a result."""

    kind: str
    message: str


def both(work: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Return ``work(rank, *args)`` of two forked processes, an error as :class:`Raised`; a hang fails."""
    context = multiprocessing.get_context("fork")
    port = free_port()

    def child(rank: int, pipe: Any) -> None:
        try:
            os.environ.update(environment(rank, port))
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(1)
            result = work(rank, *args)
        except BaseException as error:
            traceback.print_exc()
            result = Raised(type(error).__name__, str(error))
        try:
            # Plain pickle: torch's own would leave the tensors in this process's memory, which is about to end.
            pipe.send_bytes(pickle.dumps(result))
        finally:
            pipe.close()
            os._exit(0)

    pipes, children = [], []
    for rank in range(2):
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(rank, writing))
        process.start()
        writing.close()
        pipes.append(reading)
        children.append(process)
    results: list[Any] = []
    deadline = time.monotonic() + timeout
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                pytest.fail(f"process {rank} hangs")
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                results.append(None)  # killed
        return results
    finally:
        for process in children:
            process.kill()
            process.join()


# -- a run -----------------------------------------------------------------------------------------------------------


def redness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def make(
    out: Path | None = None, algorithm: str = "ddpo", reward: Any = None, kind: str = "sd", **settings: Any
) -> Trainer:
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    # A large epsilon makes Adam's step smooth in the gradient: where that is nearly 0, rounding must not flip a sign.
    chosen = {"lr": 3e-3, "adam_eps": 1e-2, **settings.pop("method", {})}
    sizes: dict[str, Any] = {"epochs": 2, "prompts_per_epoch": 3, "samples_per_prompt": 3, "micro_batch": 2}
    return Trainer(
        policy=policy,
        sampler=Sampler(policy, steps=2, guidance_scale=2.0, eta=1.0 if kind == "sd" else 0.7, batch_size=4),
        algorithm=build_algorithm(algorithm, **chosen),
        reward=reward or FunctionReward("redness", redness, True),
        prompts=PROMPTS,
        out=out,
        **{**sizes, "sample_count": 2, "save_every": 1, **settings},
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


def run(rank: int, settings: Mapping[str, Any]) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Train to the end; return the weights and the metrics."""
    trainer = make(**settings)
    before = weights(trainer)
    records = [dict(metrics.values) for metrics in trainer]
    assert float((weights(trainer) - before).abs().max()) > 1e-4
    return weights(trainer), records


def timeless(path: Path) -> list[dict[str, Any]]:
    """The log without its wall-clock fields."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "samples_per_second"))} for line in lines]


# -- equal to one process --------------------------------------------------------------------------------------------

#: Nine samples of three prompts make shares of five and four: a group, and with d3po pairs, lie across both processes.
CASES: dict[str, dict[str, Any]] = {
    "ddpo": {},
    "per_prompt": {"method": {"normalize": "prompt", "prompt_min_count": 3, "timestep_fraction": 0.5}},
    "groups": {"algorithm": "grpo", "kind": "sd3"},
    "pairs": {"algorithm": "d3po", "method": {"pairs": "all"}},
    "samples": {"algorithm": "nft"},
    "gradient": {"algorithm": "draft", "method": {"loss_scale": 1000.0}},
    "groupwise": {"reward": {"name": "group_rank", "of": "redness"}},
    # Scorers that compare samples at several places of a tree, beside one that does not.
    "tree": {
        "reward": [
            {"name": "gdpo", "of": ["redness", {"name": "win_rate", "of": "contrast"}]},
            {"name": "diversity", "weight": 0.5},
            {"name": "sigmoid", "of": "redness"},
        ]
    },
    # What learns from the scores sees them in the order of one process, and what compares samples sees all of a prompt.
    "calibrated": {"reward": [{"name": "calibrated", "of": "redness"}, {"name": "calibrated", "of": "contrast"}]},
    "calibrated_gradient": {
        "algorithm": "draft",
        "method": {"loss_scale": 100.0},
        "reward": {"name": "calibrated", "of": "contrast"},
        "monitor": ["contrast"],
    },
    "watched": {"monitor": ["contrast", "clip_score"]},
    "watched_together": {"monitor": [{"name": n, "of": "contrast"} for n in ("calibrated", "group_rank")]},
    "one_sample": {
        "algorithm": "draft",
        "method": {"loss_scale": 1000.0},
        "prompts_per_epoch": 1,
        "samples_per_prompt": 1,
        "updates_per_epoch": 1,
    },
}


def with_redness(spec: Any) -> Any:
    """Put this file's reward in the places of a tree that name it."""
    if isinstance(spec, list):
        return [with_redness(term) for term in spec]
    if isinstance(spec, dict):
        return {key: with_redness(value) if key == "of" else value for key, value in spec.items()}
    return FunctionReward("redness", redness, False) if spec == "redness" else spec


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case == "tree" else []) for case in sorted(CASES)]
)
def test_two_processes_take_the_steps_of_one(case: str) -> None:
    settings = dict(CASES[case])
    if "reward" in settings:
        settings["reward"] = build_reward(with_redness(settings["reward"]))
    # What the reward of the one learns, those of the two must not know.
    alone, records = run(0, copy.deepcopy(settings))
    (first, log), (second, other) = both(run, settings)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, atol=1e-6, rtol=0)
    for got, of_other, expected in zip(log, other, records, strict=True):
        assert got.keys() == of_other.keys() == expected.keys()
        for name in got.keys() - {"samples_per_second", "denoiser_calls", "denoiser_rows"}:
            assert got[name] == of_other[name]
            assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


class Stairs(Reward):
    """The sample's number in its epoch, in eighths: what the pictures are does not matter."""

    name = "stairs"

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        return torch.tensor([extra["number"] for extra in metadata]) / 8


def advantages(rank: int) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Return the advantages that the algorithm makes of an epoch's eight samples of one prompt, and all states."""
    trainer = make(
        reward=build_reward({"name": "calibrated", "of": Stairs()}),
        method={"normalize": "prompt", "prompt_min_count": 2},
        prompts_per_epoch=1,
        samples_per_prompt=8,
        epochs=1,
    )
    found: list[torch.Tensor] = []
    plan, prepare = trainer._plan, trainer.algorithm.prepare

    def numbered(epoch: int) -> Any:
        samples = plan(epoch)
        return dataclasses.replace(samples, metadata=[{"number": number} for number in range(8)])

    def noting(prompts: Any, rewards: Any) -> Any:
        prepared = prepare(prompts, rewards)
        found.append(prepared.values["advantage"])
        return prepared

    trainer._plan = numbered  # type: ignore[method-assign]
    trainer.algorithm.prepare = noting  # type: ignore[method-assign]
    list(trainer)
    return found[0], [process["reward"] for process in trainer.state_dict()["processes"]]


def test_a_reward_that_learns_ranks_the_samples_of_all_processes() -> None:
    """By statistics of its own, each process would make its best and its worst sample the equals of the other's."""
    alone, (state,) = advantages(0)
    (first, states), (second, _) = both(advantages)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, atol=1e-6, rtol=0)
    assert bool((alone.diff() > 0.1).all())
    assert states == [state] * 2


def keys_drawn(rank: int) -> list[SampleKey]:
    trainer = make()
    samples = trainer._plan(2)
    return [samples.keys[i] for i in samples.shares[rank]]


def test_the_same_samples_are_drawn() -> None:
    first, second = both(keys_drawn)
    assert first + second == make()._plan(2).keys and len(first) == 5


def test_shares_differ_by_one_at_most() -> None:
    assert even_shares(5, 2) == [[0, 1, 2], [3, 4]]
    assert even_shares(1, 3) == [[0], [], []]
    for count in range(12):
        for processes in range(1, 5):
            shares = even_shares(count, processes)
            assert sum(shares, []) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def drifting(rank: int) -> torch.Tensor:
    torch.manual_seed(rank)
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    torch.manual_seed(rank)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    sampler = Sampler(policy, steps=2)
    reward = FunctionReward("redness", redness, True)
    trainer = Trainer(policy=policy, sampler=sampler, algorithm=build_algorithm("ddpo"), reward=reward, prompts=PROMPTS)
    return weights(trainer)


def test_adapters_that_began_differently_are_made_one() -> None:
    first, second = both(drifting)
    assert torch.equal(first, second)


# -- one writer, and resuming ----------------------------------------------------------------------------------------


class Signalled(Reward):
    """Redness; in process ``rank`` the call of an epoch sends the process a signal."""

    name = "signalled"
    differentiable = True

    def __init__(self, rank: int, call: int) -> None:
        self.rank, self.call, self.calls = rank, call, 0

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.call and int(os.environ["RANK"]) == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return redness(images, prompts)


def run_into(rank: int, out: Path, settings: Mapping[str, Any]) -> torch.Tensor:
    trainer = make(out, epochs=3, method={"normalize": "prompt", "prompt_min_count": 3}, **settings)
    list(trainer)
    trainer.save()
    return weights(trainer)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_resumably(tmp_path: Path) -> None:
    """And the resumed run equals an uninterrupted one to the bit: weights, log, pictures, adapter."""
    whole, cut = tmp_path / "a/run", tmp_path / "b/run"
    expected, again = both(run_into, whole, {})
    assert torch.equal(expected, again)
    stopped = both(run_into, cut, {"reward": Signalled(1, 2), "save_every": 3})
    assert stopped == [Raised("KeyboardInterrupt", "")] * 2
    assert [p.name for p in checkpoints(cut / "checkpoints")] == ["step_000001"]
    resumed, other = both(run_into, cut, {"resume": True})
    assert torch.equal(resumed, expected) and torch.equal(other, expected)
    # One line per epoch: a second writer would double them.
    assert timeless(cut / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    assert len(timeless(cut / "metrics.jsonl")) == 3
    for name in ("samples/epoch_0000.png", "samples/epoch_0003.png", "adapter/pytorch_lora_weights.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


class Counting(Reward):
    """Redness above the mean of all that has been seen."""

    name = "counting"

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        scores = redness(images, prompts) + torch.rand(())  # and a draw from the process's own generator
        self.total, self.count = self.total + float(scores.sum()), self.count + len(scores)
        return scores - self.total / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


def remember(rank: int, out: Path, epochs: int, resume: bool) -> torch.Tensor:
    torch.manual_seed(100 + rank)
    trainer = make(out, reward=Counting(), epochs=epochs, resume=resume, sample_every=0)
    list(trainer)
    return weights(trainer)


@pytest.mark.slow
def test_processes_share_a_memory_and_get_their_generators_back(tmp_path: Path) -> None:
    whole, _ = both(remember, tmp_path / "whole", 3, False)
    both(remember, tmp_path / "cut", 2, False)
    reward = Counting()
    with pytest.warns(UserWarning, match="was made by 2 processes, this run has 1"):
        trainer = make(tmp_path / "cut", reward=reward, resume=True)
    assert reward.count == 2 * 9
    # Processes of an earlier release had a memory each, which one process cannot have.
    state = trainer.state_dict()
    (own,) = state["processes"]
    state["processes"] = [own, {**own, "reward": {**own["reward"], "count": 1}}]
    with pytest.raises(UserError, match="has another memory in each of 2 processes, this run has 1; resume with 2"):
        trainer.load_state_dict(state)
    resumed, _ = both(remember, tmp_path / "cut", 3, True)
    assert torch.equal(whole, resumed)


def watching(rank: int, out: Path, epochs: int, resume: bool) -> dict[str, Any]:
    monitor = [{"name": "calibrated", "of": "contrast"}]
    trainer = make(out, monitor=monitor, epochs=epochs, resume=resume, sample_every=0)
    list(trainer)
    assert trainer.monitor is not None
    return trainer.monitor.state_dict()


@pytest.mark.slow
def test_a_monitored_reward_that_learns_resumes_in_two_processes(tmp_path: Path) -> None:
    whole, other = both(watching, tmp_path / "whole", 3, False)
    assert whole == other and whole["watched"]["calibrated"]["count"] == 3 * 9
    both(watching, tmp_path / "cut", 2, False)
    assert both(watching, tmp_path / "cut", 3, True) == [whole] * 2


@pytest.mark.slow
def test_another_number_of_processes_resumes_with_a_warning(tmp_path: Path) -> None:
    both(run_into, tmp_path / "two", {"sample_every": 0})
    with pytest.warns(UserWarning, match="was made by 2 processes, this run has 1"):
        trainer = make(tmp_path / "two", epochs=4, resume=True, sample_every=0, method={"normalize": "prompt"})
    assert trainer.epoch == 3 and [metrics.epoch for metrics in trainer] == [4]


def resumed_apart(rank: int, root: Path) -> None:
    make(root / str(rank), resume=True)


def test_processes_that_see_different_folders_are_refused(tmp_path: Path) -> None:
    list(make(tmp_path / "0", epochs=1, sample_every=0))
    (tmp_path / "1").mkdir()
    # The checkpoint is of one process, which both are told of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = both(resumed_apart, tmp_path)
    assert [error.kind for error in errors] == ["UserError"] * 2
    assert all("process 0 found epoch 1" in e.message and "process 1 found 0" in e.message for e in errors)


# -- a sharded base --------------------------------------------------------------------------------------------------


def sharded(rank: int, out: Path | None, settings: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """Train to the end; return the weights and the share of the transformer's numbers that this process holds."""
    trainer = make(out, kind="sd3", sharding="fsdp", **settings)
    module = trainer.policy.denoisers["transformer"]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters() if not p.requires_grad]
    share = sum(p.numel() for p in held) / sum(p.numel() for p in module.parameters() if not p.requires_grad)
    list(trainer)
    if out is not None:
        trainer.save()
    return weights(trainer), share


#: Shares of five and four samples in batches of four make one call more in the first process; pairs, of which there can
#: be too few for both processes; and gradients through the pictures, with checkpointing.
SHARDED: dict[str, dict[str, Any]] = {
    "ddpo": {"method": {"timestep_fraction": 0.5}},
    "pairs": {"algorithm": "d3po", "prompts_per_epoch": 1},
    "samples": {"algorithm": "nft"},
    "gradient": {"algorithm": "draft", "method": {"loss_scale": 1000.0}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(SHARDED))
def test_a_sharded_base_takes_the_steps_of_a_whole_one(case: str) -> None:
    alone, _ = run(0, {"kind": "sd3", **SHARDED[case]})
    (first, share), (second, other) = both(sharded, None, SHARDED[case])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, atol=1e-6, rtol=0)
    # Layers whose first dimension is odd are cut unevenly.
    assert 0.45 < share < 0.55 and share + other == pytest.approx(1)


def test_a_sharded_run_leaves_the_folder_of_one_process(tmp_path: Path) -> None:
    both(sharded, tmp_path / "two/run", {"sample_every": 1, "epochs": 1})
    trainer = make(tmp_path / "one/run", kind="sd3", sample_every=1, epochs=1)
    list(trainer)
    trainer.save()
    two, one = tmp_path / "two/run", tmp_path / "one/run"
    found = load_file(two / "adapter/pytorch_lora_weights.safetensors")
    expected = load_file(one / "adapter/pytorch_lora_weights.safetensors")
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
    assert (two / "samples/epoch_0000.png").read_bytes() == (one / "samples/epoch_0000.png").read_bytes()
    assert len(timeless(two / "metrics.jsonl")) == 1
    # The checkpoint is one of a whole model, too.
    with pytest.warns(UserWarning, match="was made by 2 processes, this run has 1"):
        assert make(two, kind="sd3", epochs=2, resume=True).epoch == 1


def failing_sharded(rank: int) -> None:
    trainer = make(kind="sd3", sharding="fsdp")
    if rank == 1:
        # In the middle of an update, where the other waits for this one's weights.
        calls = iter(range(100))
        original = trainer.algorithm.accumulate

        def fail(*args: Any) -> Any:
            if next(calls) == 1:
                raise RuntimeError("out of memory, say")
            return original(*args)

        trainer.algorithm.accumulate = fail  # type: ignore[method-assign,assignment]
    list(trainer)


def test_a_failure_between_sharded_layers_does_not_leave_the_other_waiting() -> None:
    other, own = both(failing_sharded)
    assert own == Raised("RuntimeError", "out of memory, say")
    assert other.kind == "ProcessError" and "another process of the run has ended" in other.message


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(UserError, match="fsdp scatters the model over processes, and this run has one"):
        make(sharding="fsdp")
    errors = both(sharded, None, {"prompts_per_epoch": 1, "samples_per_prompt": 1, "updates_per_epoch": 1})
    assert all("fsdp needs a sample per process, got 1 samples" in error.message for error in errors)


# -- failing together ------------------------------------------------------------------------------------------------


class Local(Exception):
    """An error that pickle cannot send: it wants two arguments and keeps one."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} {why}")


class Failing(Reward):
    """Redness; process 1 fails at its second call."""

    name = "failing"

    def __init__(self, error: str) -> None:
        self.error, self.calls = error, 0

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        self.calls += 1
        scores = redness(images, prompts)
        if self.calls == 2 and os.environ["RANK"] == "1":
            if self.error == "user":
                raise UserError("scorer: no key in the environment; set SCORER_KEY")
            if self.error == "local":
                raise Local("out", "of luck")
            if self.error == "death":
                os._exit(9)
            scores[0] = float("nan")
        return scores


class Course(Reward):
    """Scores that follow a course from call to call, with a little of each picture."""

    name = "course"

    def __init__(self, slope: float, start: int = 0) -> None:
        self.slope, self.start, self.calls = slope, start, 0

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        self.calls += 1
        return self.slope * max(0, self.calls - self.start) + 0.01 * images.mean((1, 2, 3))


def watched(rank: int, out: Path | None) -> tuple[list[int], str, dict[str, Any]]:
    """Train until the monitored reward, which falls from epoch 5, stops the run; return epochs, alarm and state."""
    monitor = Monitor(MonitorConfig(rewards=["contrast"], window=2, action="stop"))
    monitor._watched = {"contrast": Course(-5.0, start=4)}
    sizes: dict[str, Any] = {"epochs": 9, "prompts_per_epoch": 1, "updates_per_epoch": 1, "sample_every": 0}
    trainer, done = make(out, reward=Course(1.0), monitor=monitor, **sizes), []
    try:
        for metrics in trainer:
            done.append(metrics.epoch)
    except MonitorAlarm as alarm:
        return done, str(alarm), monitor.state_dict()
    return done, "", monitor.state_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:monitor")
def test_the_monitors_of_two_processes_agree_on_the_alarm(tmp_path: Path) -> None:
    (epochs, alarm, state), other = both(watched, tmp_path)
    assert (epochs, alarm, state) == other
    assert 5 <= epochs[-1] < 9 and "go back to epoch" in alarm
    alone = watched(0, None)
    assert epochs == alone[0] and alarm == alone[1]
    assert [json.loads(line)["monitor/alarms"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *[0.0] * (len(epochs) - 1),
        1.0,
    ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("user", "scorer: no key in the environment; set SCORER_KEY"),
        ("nan", "reward 'failing' gave nan for sample 0"),
        ("local", "out of luck"),
    ],
)
def test_a_scorer_that_fails_in_one_process_stops_both_with_its_error(tmp_path: Path, kind: str, message: str) -> None:
    errors = both(run_into, tmp_path, {"reward": Failing(kind)})
    assert all(message in error.message for error in errors)
    names = {"user": ["UserError"] * 2, "nan": ["NonFiniteError"] * 2, "local": ["ProcessError", "Local"]}[kind]
    assert [error.kind for error in errors] == names
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step_000001"]


def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    error, dead = both(run_into, tmp_path, {"reward": Failing("death")})
    assert dead is None and error.kind == "ProcessError"
    assert "another process of the run has ended" in error.message and "\n" not in error.message


def held(rank: int) -> list[str]:
    processes = Processes(Accelerator())
    said = []
    with processes.signals():
        if rank == 0:
            os.kill(os.getpid(), signal.SIGINT)  # outside of any work of its own: it waits
            said.append("held")
        else:
            time.sleep(0.3)
        processes.gather(rank)
        said.append("gathered")
        try:
            processes.together(said.append, "worked")
        except KeyboardInterrupt:
            said.append("interrupted")
        # What has been raised is done with: the next work goes through.
        processes.together(said.append, "on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return said


def test_a_signal_waits_while_processes_exchange() -> None:
    assert both(held) == [["held", "gathered", "interrupted", "on"], ["gathered", "worked", "interrupted", "on"]]


def between(rank: int, out: Path) -> list[int]:
    """An interruption of one caller between two epochs, which the command line throws in."""
    trainer = make(out, epochs=3, sample_every=0)
    iterator = iter(trainer)
    next(iterator)
    with pytest.raises(KeyboardInterrupt):
        if rank == 0:
            iterator.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
        else:
            next(iterator)
    return [trainer.epoch]


def test_an_interruption_between_epochs_reaches_both(tmp_path: Path) -> None:
    assert both(between, tmp_path) == [[1], [1]]
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step_000001"]


# -- from the command line -------------------------------------------------------------------------------------------

CONFIG = """
model: difftune/tiny-sd
device: cpu
algorithm: {name: ddpo, normalize: batch}
reward: jpeg_compressibility
prompts: {source: ["two stars", "a red circle", "a blue square"]}
sampler: {steps: 2, guidance_scale: 1.0}
train: {epochs: 1, prompts_per_epoch: 3, samples_per_prompt: 3, micro_batch: 4, sample_every: 0}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_run_the_command_line(tmp_path: Path, launcher: list[str]) -> None:
    (tmp_path / "my.yaml").write_text(CONFIG)
    root = str(Path(__file__).parent.parent)
    given = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *launcher, "-m", "difftune", "train", "my.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(timeless(tmp_path / "run/metrics.jsonl")) == 1
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()
    (folder,) = checkpoints(tmp_path / "run/checkpoints")
    assert len(load_checkpoint(folder)["processes"]) == 2
