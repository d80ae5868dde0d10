"""The puppet: a scheduler of the pipeline's own class whose steps are ours.

A diffusers pipeline trusts its scheduler with everything between two denoiser calls. :func:`make_puppet` turns a copy
of the native scheduler into a *puppet*: the same class, tables, timesteps, signatures and attributes (pipelines inspect
them), but ``step()`` forms our Gaussian transition (:mod:`difftune.transition`) from the pipeline's own guided
prediction and hands it to a *driver*, which decides what the pipeline gets back. Recording, replaying, probing and
backpropagating are four drivers (:mod:`difftune.sampler`); the pipeline's code is the same in all of them.

The noise levels come from the native scheduler, so that its spacing and shift survive, whatever solver it ships with.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from difftune import transition as tr
from difftune.transition import Gaussian, Level, PredictionType
from difftune.types import UserError


class Driver(Protocol):
    """What decides, at each step, which sample the pipeline goes on with."""

    def timesteps(self, scheduler: Any) -> None:
        """Called after the pipeline has set its timesteps; may change them on ``scheduler``."""

    def step(self, prediction: Prediction) -> Tensor:
        """Return x' ``(B, *latent)`` for the pipeline to go on with, in the sample's dtype."""


@dataclass
class Prediction:
    """The pipeline's guided prediction at one step, with what is needed to step from it.

    Attributes:
        index: the number of the step in the pipeline's loop, from 0.
        timestep: the pipeline's own timestep.
        sample: ``(B, *latent)`` x_t as the pipeline holds it.
        x0: ``(B, *latent)`` predicted clean sample, fp32, with its graph.
        noise: ``(B, *latent)`` predicted noise, fp32, with its graph.
        output: ``(B, *latent)`` the guided model output itself, fp32, with its graph.
        now: level of ``sample``.
        nxt: level the step lands on.
        position: where in ``scheduler.timesteps`` the step starts (image-to-image loops begin in the middle).
        last: whether the step is the last of its loop.
        below_one: the grid's second time, which stands in for t = 1 where 1 - t divides (flow models).
        family: ``flow``, ``diffusion`` or ``lcm``.
        dynamics: name of the dynamics.
        eta: its noise level.
    """

    index: int
    timestep: float
    sample: Tensor
    x0: Tensor
    noise: Tensor
    output: Tensor
    now: Level
    nxt: Level
    position: int
    last: bool
    below_one: float
    family: str
    dynamics: str
    eta: float

    def transition(self, noisy: bool = True) -> Gaussian:
        """Return the step's Gaussian; ``noisy=False`` gives the ODE step (``std`` = 0) of the same model."""
        eta = self.eta if noisy else 0.0
        if self.family == "flow":
            name = self.dynamics if noisy else "ode"
            x, v = tr.working(self.sample), self.output
            return tr.FLOW_DYNAMICS[name](x, v, self.now.sigma, self.nxt.sigma, eta, self.below_one)
        if self.dynamics == "lcm":
            if noisy or self.last:
                return tr.lcm(self.x0, self.nxt, self.last)
            # Outside the window the sample moves to the next level along the predicted noise.
            return tr.ddim(self.x0, self.noise, self.now, self.nxt, 0.0)
        return tr.ddim(self.x0, self.noise, self.now, self.nxt, 0.0 if self.dynamics == "ode" else eta)

    def lands_on_data(self) -> bool:
        """Whether the step ends at noise level 0, where noise added by a flow SDE would stay in the picture."""
        return self.nxt.sigma == 0


#: Second-order solvers call the model twice a step on doubled timesteps: not a flat list of transitions.
_UNSUPPORTED = {
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler",
    "DPMSolverSDEScheduler": "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "KarrasVeScheduler": "",
    "ScoreSdeVeScheduler": "",
    "RePaintScheduler": "DDIMScheduler",
    # Several stages of growing latents, renoised between them.
    "HeliosScheduler": "",
    "HeliosDMDScheduler": "",
    # The model's output is itself a policy over many inner steps.
    "PiflowScheduler": "",
    # Coordinates, tokens or words, not a Gaussian latent.
    "RFD4ProteinaScheduler": "",
    "AmusedScheduler": "",
    "VQDiffusionScheduler": "",
    "DiscreteDDIMScheduler": "",
    "BlockRefinementScheduler": "",
    "EntropyBoundScheduler": "",
}

#: Schedulers whose model predicts the velocity towards the data, x0 - noise: the sign is turned.
_DATAWARD = ("MiniMaxH3Scheduler",)


class _Grid:
    """Noise levels of a native scheduler: where a step starts, where it lands, how the model's output reads."""

    family = "diffusion"

    #: Entries at the end of ``timesteps`` that name where the last step lands and are not stepped from.
    terminal = 0

    #: Whether the pipeline takes no other number of steps than the one it was distilled for.
    keeps_steps = False

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        """Return the levels a step at ``position`` of ``scheduler.timesteps`` starts from and lands on."""
        raise NotImplementedError

    def level_at(self, scheduler: Any, timestep: float) -> Level:
        """Return the level of any training timestep, on the grid or not (for the forward process)."""
        raise NotImplementedError

    def timestep_at(self, scheduler: Any, u: float) -> float:
        """Return the training timestep at the fraction ``u`` in [0, 1] of the schedule (1 is pure noise)."""
        last = scheduler.config.num_train_timesteps - 1
        return float(round(u * last))

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return the predicted ``(x0, noise)``."""
        kind: PredictionType = scheduler.config.get("prediction_type", "epsilon")
        x0, noise = tr.split_prediction(output, x, level, kind)
        return _clipped(scheduler, x0, noise, x, level)

    def remember(self, scheduler: Any) -> None:
        """Take note of the timesteps and sigmas that the pipeline has just set."""

    def oriented(self, scheduler: Any, output: Tensor) -> Tensor:
        """Return the model's output in this module's conventions (flow velocities point at the noise)."""
        return output

    def denoised(self, scheduler: Any, x0: Tensor, x: Tensor, output: Tensor, level: Level, timestep: Any) -> Tensor:
        """Return what a consistency model takes for x0."""
        return x0


def _clipped(scheduler: Any, x0: Tensor, noise: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Clip or threshold x0 as the native scheduler does; DDPM's posterior re-derives the noise from the clipped x0."""
    config = scheduler.config
    if config.get("thresholding", False) and hasattr(scheduler, "_threshold_sample"):
        x0 = scheduler._threshold_sample(x0)
    elif config.get("clip_sample", False):
        bound = config.get("clip_sample_range", 1.0)
        x0 = x0.clamp(-bound, bound)
    else:
        return x0, noise
    if "variance_type" in config and level.sigma > 0:
        noise = (x - level.alpha * x0) / level.sigma
    return x0, noise


class _Table(_Grid):
    """Variance-preserving schedulers that look alphas_cumprod up by timestep (DDIM, DDPM, PNDM, TCD, ...)."""

    def _alpha_bar(self, scheduler: Any, timestep: int) -> float:
        table = scheduler.__dict__.get("_difftune_alpha_bars")
        if table is None:
            table = scheduler.alphas_cumprod.double().tolist()
            scheduler.__dict__["_difftune_alpha_bars"] = table
        if timestep < 0:
            final = getattr(scheduler, "final_alpha_cumprod", None)
            return 1.0 if final is None else float(final)
        return table[timestep]

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        t = int(timestep)
        following = self._following(scheduler, t, position)
        return Level.vp(self._alpha_bar(scheduler, t)), Level.vp(self._alpha_bar(scheduler, following))

    def _following(self, scheduler: Any, timestep: int, position: int) -> int:
        if "DDIM" in type(scheduler).__name__ or "CogVideoX" in type(scheduler).__name__:
            # DDIM's own rule, also where its "linspace" timesteps are spaced differently.
            return timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if hasattr(scheduler, "previous_timestep"):
            return int(scheduler.previous_timestep(timestep))
        if position + 1 < len(scheduler.timesteps):
            return int(scheduler.timesteps[position + 1])
        return -1

    def level_at(self, scheduler: Any, timestep: float) -> Level:
        return Level.vp(self._alpha_bar(scheduler, int(round(timestep))))


class _Consistency(_Table):
    """LCM: the boundary scalings make the model output a consistency function."""

    family = "lcm"

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        t = int(timestep)
        last = position + 1 >= len(scheduler.timesteps)
        following = t if last else int(scheduler.timesteps[position + 1])
        return Level.vp(self._alpha_bar(scheduler, t)), Level.vp(self._alpha_bar(scheduler, following))

    def denoised(self, scheduler: Any, x0: Tensor, x: Tensor, output: Tensor, level: Level, timestep: Any) -> Tensor:
        skip, scale = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        return float(scale) * x0 + float(skip) * x


class _Wuerstchen(_Grid):
    """Wuerstchen and Stable Cascade: times run from 1 to 0 and the last entry is where the last step lands."""

    terminal = 1

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        times = scheduler.timesteps
        following = float(times[position + 1]) if position + 1 < len(times) else 0.0
        now = self.level_at(scheduler, timestep)
        return now, Level.vp(1.0) if following <= 0 else self.level_at(scheduler, following)

    def timestep_at(self, scheduler: Any, u: float) -> float:
        return u

    def level_at(self, scheduler: Any, timestep: float) -> Level:
        device = scheduler.timesteps.device
        return Level.vp(float(scheduler._alpha_cumprod(torch.tensor(timestep, dtype=torch.float64), device)))


class _Trig(_Grid):
    """TrigFlow consistency models (sCM, Sana-Sprint): x = cos(t) x0 + sin(t) sigma_data noise."""

    family = "lcm"
    terminal = 1
    keeps_steps = True

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        times = scheduler.timesteps
        following = float(times[position + 1]) if position + 1 < len(times) else 0.0
        return self.level_at(scheduler, timestep), self.level_at(scheduler, following)

    def timestep_at(self, scheduler: Any, u: float) -> float:
        return u * math.pi / 2

    def level_at(self, scheduler: Any, timestep: float) -> Level:
        return Level(math.cos(timestep), math.sin(timestep) * scheduler.config.sigma_data)

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        sine = level.sigma / scheduler.config.sigma_data
        x0 = level.alpha * x - sine * output
        return x0, (x - level.alpha * x0) / level.sigma


class _Sigmas(_Grid):
    """Schedulers with a ``sigmas`` table aligned to ``timesteps`` (one entry more: where the last step lands)."""

    def to_level(self, scheduler: Any, sigma: float) -> Level:
        """Return the level that the table's entry ``sigma`` means."""
        raise NotImplementedError

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        sigmas = scheduler.__dict__.get("_difftune_sigmas")
        if sigmas is None:
            sigmas = scheduler.sigmas.double().tolist()
            scheduler.__dict__["_difftune_sigmas"] = sigmas
        nxt = sigmas[position + 1] if position + 1 < len(sigmas) else 0.0
        return self.to_level(scheduler, sigmas[position]), self.to_level(scheduler, nxt)

    def _train_sigma(self, scheduler: Any, timestep: float) -> float:
        if scheduler.config.get("timestep_type") == "continuous":
            return math.exp(4 * timestep)
        bars = scheduler.alphas_cumprod.double()
        low = min(max(int(math.floor(timestep)), 0), len(bars) - 1)
        high = min(low + 1, len(bars) - 1)
        weight = timestep - low
        sigma = ((1 - bars) / bars).sqrt()
        return float((1 - weight) * sigma[low] + weight * sigma[high])

    def level_at(self, scheduler: Any, timestep: float) -> Level:
        return self.to_level(scheduler, self.sigma_of(scheduler, timestep))

    def sigma_of(self, scheduler: Any, timestep: float) -> float:
        """Return the table entry of a training timestep."""
        return self._train_sigma(scheduler, timestep)


class _Flow(_Sigmas):
    """Straight-path flow models: sigma is the time t in [0, 1], the output is the velocity noise - x0.

    With ``invert_sigmas`` (Mochi, OmniGen) the table counts up from 0 at pure noise, and the velocity points at the
    data.
    """

    family = "flow"

    def to_level(self, scheduler: Any, sigma: float) -> Level:
        return Level.flow(1 - sigma if scheduler.config.get("invert_sigmas", False) else sigma)

    def timestep_at(self, scheduler: Any, u: float) -> float:
        return self._scale(scheduler) * (1 - u if scheduler.config.get("invert_sigmas", False) else u)

    def sigma_of(self, scheduler: Any, timestep: float) -> float:
        table = scheduler._difftune.table
        if table is None:
            return timestep / self._scale(scheduler)
        # CogView4 shifts its sigmas but not its timesteps: what a timestep means is what the pipeline made of it.
        return float(np.interp(timestep, *table))

    def remember(self, scheduler: Any) -> None:
        times, sigmas = scheduler.timesteps.double().tolist(), scheduler.sigmas.double().tolist()
        scale = self._scale(scheduler)
        state: PuppetState = scheduler._difftune
        known = 0 if state.table is None else len(state.table[0]) - 2
        if len(times) < known or len(sigmas) < len(times):
            return
        pairs = sorted(zip(times, sigmas[: len(times)], strict=True))
        if max(abs(sigma - time / scale) for time, sigma in pairs) < 2e-3:
            state.table = None
        else:
            state.table = [0.0, *(t for t, _ in pairs), scale], [0.0, *(s for _, s in pairs), 1.0]

    @staticmethod
    def _scale(scheduler: Any) -> float:
        return scheduler.config.get("num_train_timesteps", 1000)

    def oriented(self, scheduler: Any, output: Tensor) -> Tensor:
        dataward = type(scheduler).__name__ in _DATAWARD or scheduler.config.get("invert_sigmas", False)
        return -output if dataward else output

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return tr.split_prediction(output, x, level, "flow")


class _FlowConsistency(_Flow):
    """Few-step flow models (FlowMatchLCM): each step predicts x0 and renoises it."""

    family = "lcm"


class _PreservingSigmas(_Sigmas):
    """Multistep solvers (DPM-Solver, UniPC, DEIS, SA) in diffusion mode: sigma is a VP level's ratio sigma/alpha."""

    def to_level(self, scheduler: Any, sigma: float) -> Level:
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return Level(alpha, sigma * alpha)


class _ExplodingSigmas(_Sigmas):
    """Euler and its kin: x = x0 + sigma noise; the model sees the sample scaled to unit variance."""

    def to_level(self, scheduler: Any, sigma: float) -> Level:
        return Level(1.0, sigma)

    def timestep_at(self, scheduler: Any, u: float) -> float:
        if scheduler.config.get("timestep_type") != "continuous":
            return super().timestep_at(scheduler, u)
        low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
        return 0.25 * math.log(low ** (1 - u) * high**u)

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind == "v_prediction":
            alpha = 1 / math.sqrt(level.sigma**2 + 1)
            x0, _ = tr.split_prediction(output, alpha * x, Level(alpha, level.sigma * alpha), kind)
            return x0, (x - x0) / level.sigma
        return tr.split_prediction(output, x, level, "sample" if kind == "original_sample" else kind)


class _ExplodingFlow(_ExplodingSigmas):
    """Flow-matching Euler on EDM's noise levels (Cosmos 2): the velocity dx/dsigma is the noise."""

    def sigma_of(self, scheduler: Any, timestep: float) -> float:
        return timestep / scheduler.config.num_train_timesteps

    def timestep_at(self, scheduler: Any, u: float) -> float:
        low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
        return float(low ** (1 - u) * high**u) * scheduler.config.num_train_timesteps

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return tr.split_prediction(output, x, level, "epsilon")


class _Edm(_ExplodingSigmas):
    """EDM preconditioning (Karras et al. 2022): the scheduler itself turns the output into x0."""

    def sigma_of(self, scheduler: Any, timestep: float) -> float:
        # The inverse of the scheduler's own precondition_noise.
        if "Cosine" in type(scheduler).__name__:
            return math.tan(timestep * math.pi / 2)
        return math.exp(4 * timestep)

    def timestep_at(self, scheduler: Any, u: float) -> float:
        low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
        return float(scheduler.precondition_noise(torch.tensor(low ** (1 - u) * high**u, dtype=torch.float64)))

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x0 = scheduler.precondition_outputs(x, output, torch.as_tensor(level.sigma, dtype=x.dtype, device=x.device))
        return x0, (x - x0) / level.sigma


class _SigmaConsistency(_ExplodingSigmas):
    """Consistency models (Song et al. 2023) on EDM's levels: x0 is renoised up to the next level, less sigma_min."""

    family = "lcm"

    def levels(self, scheduler: Any, timestep: float, position: int) -> tuple[Level, Level]:
        now, nxt = super().levels(scheduler, timestep, position)
        low = scheduler.config.sigma_min
        return now, Level(1.0, math.sqrt(max(nxt.sigma**2 - low**2, 0.0)))

    def sigma_of(self, scheduler: Any, timestep: float) -> float:
        return math.exp(timestep / 250) - 1e-44

    def timestep_at(self, scheduler: Any, u: float) -> float:
        low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
        return 250 * math.log(low ** (1 - u) * high**u + 1e-44)

    def split(self, scheduler: Any, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        skip, scale = scheduler.get_scalings_for_boundary_condition(torch.tensor(level.sigma, dtype=torch.float64))
        x0 = float(scale) * output + float(skip) * x
        if scheduler.config.get("clip_denoised", False):
            x0 = x0.clamp(-1, 1)
        return x0, (x - x0) / level.sigma


def grid_of(scheduler: Any) -> _Grid:
    """Return how to read the noise levels of a native scheduler.

    Raises:
        UserError: the scheduler cannot be written as a flat list of Gaussian steps; the message names a substitute.
    """
    name = type(scheduler).__name__
    if name in _UNSUPPORTED:
        other = _UNSUPPORTED[name]
        remedy = f"set model.scheduler: {other}" if other else "this pipeline cannot be trained by difftune yet"
        raise UserError(f"scheduler {name}: its steps are not single Gaussian transitions; {remedy}")
    if hasattr(scheduler, "precondition_outputs"):
        return _Edm()
    special = {
        "LCMScheduler": _Consistency,
        "SCMScheduler": _Trig,
        "DDPMWuerstchenScheduler": _Wuerstchen,
        "CMStochasticIterativeScheduler": _SigmaConsistency,
        "FlowMatchLCMScheduler": _FlowConsistency,
    }
    if name in special:
        return special[name]()
    config = scheduler.config
    if name.startswith("FlowMatch") and (config.get("sigma_max") or 0) > 1:
        return _ExplodingFlow()
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas", False) or (
        config.get("prediction_type", "") == "flow_prediction"
    ):
        return _Flow()
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return _PreservingSigmas()
    if hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "sigmas") and hasattr(scheduler, "alphas_cumprod"):
        return _ExplodingSigmas()
    if hasattr(scheduler, "alphas_cumprod"):
        return _Table()
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "set_timesteps"):
        # A table of sigmas without a noise schedule beside it: a flow scheduler under a name of its own.
        return _Flow()
    raise UserError(
        f"scheduler {name} has neither alphas_cumprod nor a known table of sigmas; "
        "expected a diffusion or flow-matching scheduler of diffusers"
    )


class PuppetState:
    """What a puppet carries beside its native state: settings, the driver of the current call and the loop counter."""

    def __init__(self, grid: _Grid, dynamics: str, eta: float) -> None:
        self.grid = grid
        self.dynamics = dynamics
        self.eta = eta
        self.driver: Driver | None = None
        self.index = 0
        self.position: int | None = None
        self.batch: int | None = None
        self.table: tuple[list[float], list[float]] | None = None
        self.fold: str | None = None
        self.entered = False

    def begin(self, driver: Driver | None, batch: int | None = None) -> None:
        """Start a call of the pipeline with ``batch`` samples, or end it (``driver=None``)."""
        self.driver, self.batch = driver, batch
        self.index, self.position, self.fold, self.entered = 0, None, None, False


def resolve_dynamics(dynamics: str, grid: _Grid) -> str:
    """Return the dynamics that ``dynamics`` ("auto" or a name) means for a scheduler's family.

    Raises:
        UserError: the dynamics belongs to another family.
    """
    allowed = tr.DYNAMICS[grid.family]
    if dynamics == "auto":
        return allowed[0]
    if dynamics not in allowed:
        raise UserError(
            f"sampler.dynamics: got {dynamics!r}, expected one of {', '.join(('auto', *allowed))} "
            f"for a scheduler of the {grid.family} family"
        )
    return dynamics


def make_puppet(native: Any, dynamics: str = "auto", eta: float = 1.0) -> Any:
    """Return a puppet of ``native``: a copy with the same class, tables and signatures, whose steps a driver decides.

    Args:
        native: any diffusers scheduler.
        dynamics: ``auto``, or a name of :data:`difftune.transition.DYNAMICS` for the scheduler's family.
        eta: the dynamics' noise level.

    Raises:
        UserError: the scheduler or the dynamics cannot be used.
    """
    grid = grid_of(native)
    puppet = copy.deepcopy(native)
    puppet.__class__ = _puppet_class(type(native))  # type: ignore[arg-type]
    puppet.__dict__["_difftune"] = PuppetState(grid, resolve_dynamics(dynamics, grid), eta)
    return puppet


@functools.cache
def _puppet_class(native: type) -> type:
    signature = inspect.signature(native.step)  # type: ignore[attr-defined]

    @functools.wraps(native.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = native.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
        _reset(self)
        return result

    # functools.wraps keeps the native signatures: pipelines look for eta, generator, sigmas and mu in them.
    @functools.wraps(native.step)  # type: ignore[attr-defined]
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        # By name: CogVideoX's DPM solver puts other arguments between the output and the sample.
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        state: PuppetState = self._difftune
        if state.driver is None:
            raise RuntimeError("a puppet steps only inside a sampler's call")
        state.entered = True
        prediction = _predict(self, given)
        # A copy, since pipelines write into their latents; and in one layout, since kernels round by strides.
        following = _unfold(state, state.driver.step(prediction)).clone(memory_format=torch.contiguous_format)
        _advance(self)
        x0 = _unfold(state, prediction.x0.to(following.dtype))
        if not given.get("return_dict", True):
            return following, x0
        return StepOutput(prev_sample=following, pred_original_sample=x0, denoised=x0)

    def deepcopied(self: Any, memo: dict[int, Any]) -> Any:
        raise UserError(
            f"the pipeline steps copies of its {native.__name__}, so its loop has several chains of steps; difftune "
            "trains pipelines with one"
        )

    namespace: dict[str, Any] = {"step": step, "set_timesteps": set_timesteps, "__deepcopy__": deepcopied}
    if not hasattr(native, "scale_model_input"):
        # Pipelines that compare types rather than ask (Bria) take the puppet for a scheduler that scales.
        namespace["scale_model_input"] = lambda self, sample, timestep=None: sample
    return type(native.__name__, (native,), {**namespace, "__module__": native.__module__})


@dataclass
class StepOutput:
    """What ``step(return_dict=True)`` returns: the fields of all native output classes."""

    prev_sample: Tensor
    pred_original_sample: Tensor
    denoised: Tensor

    def __getitem__(self, key: int | str) -> Tensor:
        """Return a field by its name or number, as diffusers' outputs do."""
        fields = (self.prev_sample, self.pred_original_sample)
        return getattr(self, key) if isinstance(key, str) else fields[key]


def _reset(scheduler: Any) -> None:
    state: PuppetState = scheduler._difftune
    # The index counts on: several loops (one per section, one per free-init round) are one list of steps.
    state.position = None
    scheduler.__dict__.pop("_difftune_sigmas", None)
    if type(scheduler).__name__ == "PNDMScheduler":
        # Its multistep warm-up repeats timesteps; single steps visit each once.
        seen = dict.fromkeys(scheduler.timesteps.tolist())
        scheduler.timesteps = torch.tensor(list(seen), device=scheduler.timesteps.device)
    state.grid.remember(scheduler)
    if state.driver is not None:
        state.driver.timesteps(scheduler)


def _position(scheduler: Any, timestep: Any) -> int:
    """Return where the loop stands in ``scheduler.timesteps`` (image-to-image loops begin in the middle)."""
    state: PuppetState = scheduler._difftune
    if state.position is None:
        begin = getattr(scheduler, "_begin_index", None)
        if begin is None:
            matches = (scheduler.timesteps == timestep).nonzero().flatten()
            begin = int(matches[0]) if len(matches) else 0
        state.position = int(begin)
        return state.position
    times = scheduler.timesteps
    if state.position >= len(times) or not bool(times[state.position] == timestep):
        # A loop that starts over on the same timesteps, or leaves some out.
        matches = (times == timestep).nonzero().flatten()
        state.position = int(matches[0]) if len(matches) else min(state.position, len(times) - 1)
    return state.position


def _advance(scheduler: Any) -> None:
    state: PuppetState = scheduler._difftune
    state.index += 1
    assert state.position is not None
    state.position += 1
    if "_step_index" in scheduler.__dict__:
        scheduler._step_index = state.position


def _fold(state: PuppetState, sample: Tensor) -> Tensor:
    """Return ``sample`` with one row per sample of the batch.

    Some video pipelines step frames as rows, ``(B * F, ...)``: they become ``(B, F, ...)``. DiT steps the guided batch
    twice over, ``(2 B, ...)`` with equal halves: the first half stands for both.
    """
    rows, batch = len(sample), state.batch
    if batch is None or rows == batch:
        return sample
    if state.fold is None:
        twice = rows == 2 * batch and torch.equal(sample[:batch], sample[batch:])
        state.fold = "twice" if twice else "rows"
    if rows % batch:
        raise UserError(f"the pipeline steps {rows} samples for {batch} prompts, expected as many or a multiple")
    return sample[:batch] if state.fold == "twice" else sample.unflatten(0, (batch, rows // batch))


def _unfold(state: PuppetState, sample: Tensor) -> Tensor:
    if state.fold is None:
        return sample
    return torch.cat([sample, sample]) if state.fold == "twice" else sample.flatten(0, 1)


def _predict(scheduler: Any, given: Mapping[str, Any]) -> Prediction:
    state: PuppetState = scheduler._difftune
    output, timestep, sample = given["model_output"], given["timestep"], given["sample"]
    if isinstance(timestep, Tensor) and timestep.ndim:
        timestep = timestep.flatten()[0]
    position = _position(scheduler, timestep)
    now, nxt = state.grid.levels(scheduler, float(timestep), position)
    if output.shape[1] == 2 * sample.shape[1] and output.shape[2:] == sample.shape[2:]:
        # Learned-variance models predict the noise and, in the second half, a variance we do not use.
        output = output[:, : sample.shape[1]]
    if given.get("per_token_timesteps") is not None:
        # With a time per token the native step subtracts what it otherwise adds; tokens at another time are
        # conditions, which the pipeline puts back afterwards.
        output = -output
    sample, output = _fold(state, sample), _fold(state, output)
    x, out = tr.working(sample), state.grid.oriented(scheduler, tr.working(output))
    x0, noise = state.grid.split(scheduler, out, x, now)
    if state.dynamics == "lcm":
        x0 = state.grid.denoised(scheduler, x0, x, out, now, timestep)
    below = state.grid.levels(scheduler, float(scheduler.timesteps[0]), 0)[1] if state.grid.family == "flow" else nxt
    return Prediction(
        index=state.index,
        timestep=float(timestep),
        sample=sample,
        x0=x0,
        noise=noise,
        output=out,
        now=now,
        nxt=nxt,
        position=position,
        last=position + 1 + state.grid.terminal >= len(scheduler.timesteps),
        below_one=below.sigma,
        family=state.grid.family,
        dynamics=state.dynamics,
        eta=state.eta,
    )


def override_timesteps(scheduler: Any, timesteps: Sequence[float]) -> None:
    """Replace a puppet's timesteps, and its sigmas where it has them, by ``timesteps`` (for probing)."""
    old = scheduler.timesteps
    grid: _Grid = scheduler._difftune.grid
    times = [*timesteps, *([0.0] * grid.terminal)]
    scheduler.timesteps = torch.tensor(times, dtype=old.dtype, device=old.device)
    if isinstance(grid, _Sigmas):
        sigmas = [grid.sigma_of(scheduler, t) for t in timesteps] + [0.0]
        scheduler.sigmas = torch.tensor(sigmas, dtype=scheduler.sigmas.dtype, device=scheduler.sigmas.device)
    scheduler.__dict__.pop("_difftune_sigmas", None)
