"""The sampler: records rollouts of an unmodified pipeline, and replays, probes and backpropagates through them.

Every mode is one call of the pipeline's own ``__call__`` with a :mod:`puppet <difftune.puppet>` scheduler, whose
:mod:`driver <difftune.drivers>` decides what each step returns, and a :class:`~difftune.denoiser.Tap` on the denoiser,
which decides whether it runs, runs with gradients or is skipped. Guidance, rescaling, packing and decoding stay the
pipeline's code.

Noise belongs to the samples, not to the batch: it is keyed by (seed, epoch, prompt, sample) and the step, so that a
sample does not depend on the batch size, the number of processes or the order of prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from difftune.denoiser import Action, InferenceModeError, Tap
from difftune.drivers import (
    Backpropagator,
    BlendTracer,
    Decoder,
    LoopLeft,
    PointView,
    Prober,
    PullBack,
    Recorder,
    Replayer,
    Retracer,
    StepCounter,
    StepView,
)
from difftune.memory import halving, is_exhausted
from difftune.noise import KeyedDraws, KeyedGenerator, keyed_generator, keyed_noise
from difftune.policy import Policy, pipeline_modules
from difftune.prompt_cache import PromptCache
from difftune.prompts import PICTURES
from difftune.puppet import Prediction, make_puppet
from difftune.quirks import quirk_of
from difftune.transition import Gaussian, Level
from difftune.types import NonFiniteError, ParityError, SampleKey, Trajectory, UserError
from difftune.window import Window, resolve_window


def sample_keys(prompts: Sequence[str], seed: int, epoch: int) -> tuple[SampleKey, ...]:
    """Return one key per prompt, numbering the repetitions of each prompt in the order they come."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(SampleKey(seed, epoch, prompt, seen[prompt]))
        seen[prompt] += 1
    return tuple(keys)


class Sampler:
    """Drives a policy's pipeline.

    Args:
        policy: the policy.
        steps: denoising steps T.
        guidance_scale: passed to the pipeline where it takes one; its own default if ``None``.
        eta: noise level of the dynamics: DDIM's eta (1 is DDPM), Flow-GRPO's a (0.7), Dance's eta (0.3), CPS's (0.9).
        dynamics: ``auto``, ``ddim``, ``flow_sde``, ``dance_sde``, ``cps``, ``lcm`` or ``ode``.
        window: indices of the steps that carry noise; all by default, except that a flow SDE's last step, which would
            leave its noise in the picture, is an ODE step. The others are ODE steps. A
            :class:`~difftune.window.Window` (or its settings) is drawn or moves from epoch to epoch.
        batch_size: samples per pipeline call.
        height, width: picture size in pixels; the pipeline's default if ``None``.
        negative_prompt: one negative prompt for all samples.
        store: where trajectories are kept: on the ``device`` or in (pinned) ``host`` memory.
        call: further arguments of the pipeline's ``__call__``, the same for every sample.
        autocast: dtype for ``torch.autocast`` around the pipeline, in every mode alike; off by default.
        initial_noise: whether x_T belongs to the ``sample``, or to the ``prompt``: then the samples of one prompt and
            epoch begin from the same noise (D3PO, PRDP, DanceGRPO) and differ by the noise of the steps.

    Raises:
        UserError: the scheduler or the dynamics cannot be used, or the pipeline does not take an argument.
    """

    def __init__(
        self,
        policy: Policy,
        steps: int = 20,
        guidance_scale: float | None = None,
        eta: float = 1.0,
        dynamics: str = "auto",
        window: Sequence[int] | Window | Mapping[str, Any] | None = None,
        *,
        batch_size: int = 16,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        store: Literal["device", "host"] = "device",
        call: Mapping[str, Any] | None = None,
        autocast: torch.dtype | None = None,
        initial_noise: Literal["sample", "prompt"] = "sample",
    ) -> None:
        if steps < 1:
            raise UserError(f"sampler.steps: got {steps}, expected at least 1")
        self.policy = policy
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.eta = eta
        self.window = resolve_window(window, steps)
        quirk = quirk_of(type(policy.pipe).__name__)
        if quirk.refuse:
            raise UserError(f"model: {type(policy.pipe).__name__} cannot be trained: {quirk.refuse}")
        #: Whether a batch that exhausts the device's memory is halved.
        self.shrinks = True
        self.batch_size = batch_size if quirk.max_batch is None else min(batch_size, quirk.max_batch)
        self.store = store
        self.autocast = autocast
        self.initial_noise = initial_noise
        self._seats = find_scheduler(policy.pipe)
        self._puppet = make_puppet(getattr(*self._seats[0]), dynamics, eta)
        self.dynamics: str = self._puppet._difftune.dynamics
        extra = {n: m for n, m in pipeline_modules(policy.pipe).items() if n.startswith("controlnet")}
        self._tap = Tap({**policy.denoisers, **extra})
        self._cache = PromptCache(policy.pipe)
        self._form: int | None = None
        self._skips = True
        self._output_type = "pt"
        self._length: int | None = None
        self._swaps_processors = _swaps_processors(policy.pipe)
        self._parameters = _call_parameters(policy.pipe)
        wanted = {
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "negative_prompt": negative_prompt,
        }
        # An embedded model may need arguments of its own; what the user says wins.
        own = getattr(policy.pipe, "difftune_call", {})
        set_here = {name: value for name, value in wanted.items() if value is not None}
        self._fixed = {**own, **set_here, **(call or {})}
        for name in self._fixed:
            if name not in self._parameters and not self._takes_anything():
                raise UserError(
                    f"sampler: {type(policy.pipe).__name__} takes no {name!r}; its arguments are "
                    f"{', '.join(sorted(self._parameters))}"
                )

    def _takes_anything(self) -> bool:
        # Where diffusers' own pipelines have **kwargs, it is for names they dropped: anything else is ignored silently.
        if type(self.policy.pipe).__module__.startswith("diffusers."):
            return False
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values())

    @property
    def denoiser_calls(self) -> int:
        """Forward passes of the denoiser that were run so far (skipped steps do not count)."""
        return self._tap.calls

    @property
    def denoiser_rows(self) -> int:
        """Rows of the batches of these passes: the papers' denoiser calls (a guided step of one picture is two)."""
        return self._tap.rows

    def uncount(self, calls: int, rows: int) -> None:
        """Go back to these numbers of passes and rows: those since then belong to an attempt that failed."""
        self._tap.calls, self._tap.rows = calls, rows

    # -- record ------------------------------------------------------------------------------------------

    def rollout(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        epoch: int = 0,
        keys: Sequence[SampleKey] | None = None,
        conditions: Mapping[str, Sequence[Any]] | None = None,
        decode: bool = True,
    ) -> Trajectory:
        """Sample one image per prompt and record how.

        Args:
            prompts: ``B`` prompts; a prompt may come several times.
            seed, epoch: what the noise is keyed by, with the prompt and its repetition.
            keys: the keys themselves, in place of seed and epoch.
            conditions: further arguments of the pipeline's call, one value per sample (init images, masks, ...). A
                :class:`~pathlib.Path` stands for the picture in that file. Arguments that are single numbers for the
                pipeline (``num_frames``, ``strength``) must be the same for all samples of a call.
            decode: whether to decode images.

        Raises:
            NonFiniteError: a latent or image is NaN or infinite; the message names the sample.
            UserError: no prompts; or the device's memory does not hold one sample (larger batches are halved).
        """
        prompts = tuple(prompts)
        keys = sample_keys(prompts, seed, epoch) if keys is None else tuple(keys)
        parts: list[Trajectory] = []
        while (start := sum(map(len, parts))) < len(prompts):
            draw = functools.partial(self._record_from, start, prompts, keys, conditions or {}, decode)
            undo = functools.partial(self._shrink, self.denoiser_calls, self.denoiser_rows)
            size = min(self.batch_size, len(prompts) - start)
            parts.append(halving(draw, size, "a rollout", smallest=1 if self.shrinks else size, undo=undo))
        if not parts:
            raise UserError("rollout: got no prompts, expected at least one")
        return Trajectory.cat(parts)

    def _shrink(self, calls: int, rows: int, size: int) -> str:
        self.batch_size = size
        self.uncount(calls, rows)
        return (
            f"sampler.batch_size is {size} from here on, and the samples stay the same; write that into the "
            "configuration to save the failed attempt"
        )

    def _record_from(
        self,
        start: int,
        prompts: tuple[str, ...],
        keys: tuple[SampleKey, ...],
        conditions: Mapping[str, Sequence[Any]],
        decode: bool,
        size: int,
    ) -> Trajectory:
        rows = slice(start, start + size)
        batch = {name: values[rows] for name, values in conditions.items()}
        return self._record(prompts[rows], keys[rows], batch, decode)

    def _record(
        self, prompts: tuple[str, ...], keys: tuple[SampleKey, ...], conditions: Mapping[str, Any], decode: bool
    ) -> Trajectory:
        # How many steps a call has is known once one has run through: loops can come in sections.
        driver = Recorder(self._take_step(keys), None if decode else self._length)
        try:
            out = self._drive(driver, prompts, keys, conditions)
        except Exception as error:
            about_output = "output_type" in str(error) or "type pt" in str(error)
            if isinstance(error, UserError) or not about_output or self._output_type == "np":
                raise
            self._output_type = "np"
            return self._record(prompts, keys, conditions, decode)
        self._length = driver.length
        kept = None
        if driver.length and not driver.followed:
            tracer = BlendTracer(driver.outs)
            self._drive(tracer, prompts, keys, conditions)
            kept = tracer.kept
        trajectory = driver.trajectory(prompts, keys, conditions, kept)
        _require_finite(trajectory.states, "latent", prompts)
        if decode:
            images = to_images(out, len(prompts))
            _require_finite(images, "image", prompts)
            trajectory = dataclasses.replace(trajectory, images=images)
        return trajectory.on_host() if self.store == "host" else trajectory

    def retrace(self, latents: Tensor, prompts: Sequence[str], keys: Sequence[SampleKey], steps: int) -> Trajectory:
        """Return steps that could have drawn given samples: the sampler's own, with the truth for a prediction.

        Costs no denoiser call; the sampler must have drawn something before.

        Args:
            latents: ``(B, *latent)`` clean samples, in the form the scheduler steps.
            prompts, keys: theirs, of one pipeline call.
            steps: steps of a rollout's trajectory.
        """
        prompts, keys = tuple(prompts), tuple(keys)
        driver = Retracer(self._take_step(keys), latents, steps)
        self._drive(driver, prompts, keys, {})
        return driver.trajectory(prompts, keys, {})

    def check_conditions(self, conditions: Mapping[str, Sequence[Any]]) -> None:
        """Refuse conditions that the pipeline's call would not take, before anything is drawn.

        Args:
            conditions: of all prompts of a run, one value per prompt.

        Raises:
            UserError: the pipeline has no such argument, or takes one number where prompts differ.
        """
        for name, values in conditions.items():
            if name not in self._parameters and not self._takes_anything():
                raise UserError(
                    f"prompts: {type(self.policy.pipe).__name__} takes no {name!r}; its arguments are "
                    f"{', '.join(sorted(self._parameters))}"
                )
            self._condition(name, values)

    def _condition(self, name: str, values: Any) -> Any:
        return as_argument(self.policy.pipe, name, values, self._parameters)

    def loop_length(
        self,
        prompts: Sequence[str],
        keys: Sequence[SampleKey],
        conditions: Mapping[str, Sequence[Any]] | None = None,
    ) -> int:
        """Return the number of steps in the pipeline's loop: fewer than ``steps`` where it begins in the middle.

        Costs one denoiser call at most, and nothing at all once something has been drawn.

        Args:
            prompts, keys, conditions: of samples that are drawn in one call, as in :meth:`rollout`.
        """
        if self._length is None:
            counter = StepCounter()
            self._drive(counter, tuple(prompts), tuple(keys), conditions or {})
            self._length = counter.length
        return self._length

    def noisy_steps(self, seed: int, epoch: int) -> tuple[int, ...] | None:
        """Return the steps inside the window in an epoch; ``None`` where there is no window."""
        if isinstance(self.window, Window):
            return self.window.steps_at(self.steps, seed, epoch)
        return self.window

    def _take_step(self, keys: tuple[SampleKey, ...]) -> Callable[[Prediction], tuple[Tensor, Gaussian]]:
        """Return what draws a step: x' in the sample's dtype, and the Gaussian it was drawn from."""
        window = self.noisy_steps(keys[0].seed, keys[0].epoch)

        def take(prediction: Prediction) -> tuple[Tensor, Gaussian]:
            noisy = _carries_noise(prediction, window)
            gaussian = prediction.transition(noisy)
            if not noisy:
                return gaussian.mean.to(prediction.sample.dtype), gaussian
            noise = keyed_noise(keys, f"step{prediction.index}", gaussian.mean)
            return gaussian.sample(noise).to(prediction.sample.dtype), gaussian

        return take

    # -- replay ------------------------------------------------------------------------------------------

    def replay(
        self,
        trajectory: Trajectory,
        on_step: Callable[[StepView], Any],
        steps: Sequence[int] | None = None,
        *,
        grad: bool = True,
    ) -> None:
        """Run the recorded call again, teacher-forced, and hand each wanted step to ``on_step``.

        Args:
            trajectory: the samples to replay, in one pipeline call.
            on_step: gets a :class:`StepView`; it may call ``backward`` at once, after which the step's graph is gone.
            steps: indices of the steps wanted, all stochastic ones by default. The denoiser runs at these only.
            grad: whether to record graphs.

        Raises:
            ValueError: a wanted step carries no noise.
            ParityError: the pipeline does not come by the recorded samples again.
        """
        wanted = trajectory.stochastic_steps if steps is None else sorted(set(steps))
        deterministic = [k for k in wanted if not bool(trajectory.stochastic[k])]
        if deterministic:
            raise ValueError(
                f"step {deterministic[0]} carries no noise and has no log-prob; stochastic steps are "
                f"{trajectory.stochastic_steps}"
            )
        if not wanted:
            raise UserError(
                f"no step to replay: none of the loop's {trajectory.num_steps} steps carries noise (dynamics="
                f"{self.dynamics}, eta={self.eta:g}, window={self.window}); set sampler.eta above 0, and a window in "
                "the loop, which is shorter than sampler.steps where `strength` is below 1"
            )
        driver = Replayer(trajectory, on_step, wanted, grad)
        self._drive(driver, trajectory.prompts, trajectory.keys, trajectory.conditions)

    def transitions(self, trajectory: Trajectory, steps: Sequence[int] | None = None) -> dict[int, Gaussian]:
        """Return the Gaussians of the wanted steps under the weights in place, without gradients.

        They are kept where trajectories are (``store``).
        """
        found: dict[int, Gaussian] = {}

        def keep(view: StepView) -> None:
            found[view.index] = view.gaussian.to("cpu") if self.store == "host" else view.gaussian

        self.replay(trajectory, keep, steps, grad=False)
        return found

    # -- probe -------------------------------------------------------------------------------------------

    def probe(
        self,
        prompts: Sequence[str],
        points: Sequence[tuple[float, Tensor]],
        on_point: Callable[[PointView], Any],
        *,
        keys: Sequence[SampleKey] | None = None,
        conditions: Mapping[str, Sequence[Any]] | None = None,
        grad: bool = True,
        guidance_scale: float | None = None,
    ) -> None:
        """Evaluate the pipeline's guided prediction at chosen points of the forward process.

        Args:
            prompts: ``B`` prompts.
            points: ``(timestep, x_t)`` pairs, x_t of shape ``(B, *latent)``; one timestep per forward pass.
            on_point: gets a :class:`PointView` per point, in order; may call ``backward`` at once.
            keys, conditions: as in :meth:`rollout`, for pipelines that draw noise of their own.
            grad: whether to record graphs.
            guidance_scale: classifier-free guidance of the prediction, 1 for none; the sampler's own if ``None``.
                Guidance that a distilled model takes as an input stays as it is.
        """
        prompts = tuple(prompts)
        keys = sample_keys(prompts, 0, 0) if keys is None else tuple(keys)
        if not points:
            raise ValueError("no point to probe")
        given: dict[str, Any] = {**(conditions or {}), **self._guided(guidance_scale)}
        keeps_steps = self._puppet._difftune.grid.keeps_steps
        size = max(self.steps - 1, 1) if keeps_steps else len(points)
        for start in range(0, len(points), size):
            part = points[start : start + size]
            driver = Prober(part, on_point, grad, start)
            steps = self.steps if keeps_steps else self._probing_steps(len(part), given)
            self._drive(driver, prompts, keys, given, steps=steps)
            if driver.visited < len(part):
                raise UserError(
                    f"probe: {type(self.policy.pipe).__name__} came by {driver.visited} of {len(part)} points; its "
                    "loop leaves out more steps than `strength` says"
                )

    def _guided(self, scale: float | None) -> dict[str, float]:
        """Return the argument of the call that sets classifier-free guidance, where there is one."""
        if scale is None:
            return {}
        name = "true_cfg_scale" if "true_cfg_scale" in self._parameters else "guidance_scale"
        distilled = name == "guidance_scale" and any(map(_takes_guidance, self.policy.denoisers.values()))
        return {name: scale} if name in self._parameters and not distilled else {}

    def _probing_steps(self, points: int, conditions: Mapping[str, Any]) -> int:
        """Return how many steps to ask for so that the loop has at least one step more than there are points."""
        parameter = self._parameters.get("strength")
        default = 1.0 if parameter is None or parameter.default is None else parameter.default
        strength = conditions.get("strength", self._fixed.get("strength", default))
        if not isinstance(strength, (int, float)) or not 0 < strength < 1:
            strength = 1.0
        return points + 1 if strength == 1 else math.ceil((points + 1) / strength) + 1

    def level(self, timestep: float) -> Level:
        """Return the noise level of a training timestep (diffusion: an index; flow: t * num_train_timesteps)."""
        return self._puppet._difftune.grid.level_at(self._puppet, timestep)

    def timestep(self, u: float) -> float:
        """Return the training timestep at the fraction ``u`` in [0, 1] of the schedule; 1 is pure noise."""
        return self._puppet._difftune.grid.timestep_at(self._puppet, u)

    # -- backprop ----------------------------------------------------------------------------------------

    def backprop(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        epoch: int = 0,
        keys: Sequence[SampleKey] | None = None,
        conditions: Mapping[str, Sequence[Any]] | None = None,
        grad_steps: Sequence[int] | None = None,
        stop: int | None = None,
        checkpointing: bool = True,
    ) -> Tensor:
        """Sample with a graph from the images back to the weights.

        Args:
            prompts, seed, epoch, keys, conditions: as in :meth:`rollout`; the same keys draw the same images.
            grad_steps: steps whose denoiser call is differentiated, all by default; at the others the prediction is a
                constant, while the sample itself still carries the graph through the scheduler's linear terms.
            stop: end at this step and decode the clean sample that it predicts; later steps cost no denoiser call.
            checkpointing: recompute each denoiser call in the backward pass: memory of one call, not of T.

        Returns:
            ``(B, 3, H, W)`` or ``(B, F, 3, H, W)`` images in [0, 1] with their graph.
        """
        prompts = tuple(prompts)
        keys = sample_keys(prompts, seed, epoch) if keys is None else tuple(keys)
        wanted = range(self.steps) if grad_steps is None else grad_steps
        driver = Backpropagator(self._take_step(keys), frozenset(wanted), stop)
        return self._pictures(driver, prompts, keys, conditions or {}, checkpointing=checkpointing)

    def decode(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        keys: Sequence[SampleKey],
        conditions: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Return the pictures of any latents, by what the pipeline does after its loop.

        Costs no denoiser call; the sampler must have drawn something before.

        Args:
            latents: ``(B, *latent)``, in the form the scheduler steps.
            prompts, keys, conditions: those of the samples, as in :meth:`rollout`.

        Returns:
            ``(B, 3, H, W)`` or ``(B, F, 3, H, W)`` images in [0, 1], with the graph back to ``latents``.

        Raises:
            UserError: ``latents`` require a gradient, and the pipeline decodes without a graph.
        """
        images = self._pictures(Decoder(latents), tuple(prompts), tuple(keys), conditions or {})
        if latents.requires_grad and not images.requires_grad:
            raise UserError(
                f"{type(self.policy.pipe).__name__} decodes without a graph, so no reward's gradient reaches its "
                "latents; use an algorithm of transitions or samples (ddpo, grpo, nft)"
            )
        return images

    def pull_back(self, trajectory: Trajectory, index: int, vector: Tensor) -> Tensor:
        """Return ``vector`` times the Jacobian of step ``index``'s mean by the sample that the step before returned.

        Costs one denoiser call with its backward pass.

        Args:
            trajectory: the recorded samples.
            index: at least 1: what step 0 receives is the pipeline's own.
            vector: ``(B, *latent)``.

        Returns:
            ``(B, *latent)``, 0 in dimensions that the pipeline overwrites between the two steps.
        """
        if not 1 <= index < trajectory.num_steps:
            raise ValueError(f"pull_back: got step {index}, expected 1 to {trajectory.num_steps - 1}")
        driver = PullBack(trajectory, index, vector)
        self._drive(driver, trajectory.prompts, trajectory.keys, trajectory.conditions)
        assert driver.result is not None, "the loop ended before the step"
        return driver.result

    def _pictures(
        self,
        driver: Any,
        prompts: tuple[str, ...],
        keys: tuple[SampleKey, ...],
        conditions: Mapping[str, Any],
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """Run a call whose output is to carry a graph.

        Raises:
            UserError: the pipeline decodes by numpy.
        """
        try:
            out = self._drive(driver, prompts, keys, conditions, checkpointing=checkpointing)
        except RuntimeError as error:
            if "numpy() on Tensor that requires grad" not in str(error):
                raise
            raise UserError(
                f"{type(self.policy.pipe).__name__} decodes by numpy, which carries no gradient; use an algorithm of "
                "transitions or samples (ddpo, grpo, nft), or a pipeline that decodes with tensors"
            ) from None
        double = all(parameter.dtype == torch.float64 for parameter in self.policy.parameters())
        return to_images(out, len(prompts), torch.float64 if double else torch.float32)

    # -- the one call ------------------------------------------------------------------------------------

    def _arguments(
        self, prompts: tuple[str, ...], keys: tuple[SampleKey, ...], conditions: Mapping[str, Any], steps: int
    ) -> dict[str, Any]:
        given: dict[str, Any] = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            "batch_size": len(prompts),
            "output_type": self._output_type,
            "return_dict": True,
            **self._fixed,
            **{name: self._condition(name, values) for name, values in conditions.items()},
        }
        if isinstance(given.get("negative_prompt"), str):
            given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
        if self._takes_anything():
            return given
        if "prompt" in self._parameters:
            # Where there are prompts, they say how many samples there are.
            del given["batch_size"]
        return {name: value for name, value in given.items() if name in self._parameters}

    def _drive(
        self,
        driver: Any,
        prompts: tuple[str, ...],
        keys: tuple[SampleKey, ...],
        conditions: Mapping[str, Any],
        *,
        steps: int | None = None,
        checkpointing: bool = False,
    ) -> Any:
        """Call the pipeline with the puppet in place; ``None`` if the driver left the loop."""
        state = self._puppet._difftune
        if self.initial_noise == "prompt":
            # What the pipeline draws itself is x_T; the noise of the steps is the driver's, by the samples' own keys.
            keys = tuple(dataclasses.replace(key, sample=-1) for key in keys)
        arguments = self._arguments(prompts, keys, conditions, self.steps if steps is None else steps)
        natives = [getattr(owner, name) for owner, name in self._seats]
        processors = self._processors() if self._swaps_processors else {}
        draws = KeyedDraws(keys)
        skipped = False

        def decide() -> Action:
            nonlocal skipped
            # The denoiser's turn: prompts are encoded.
            self.policy.rest()
            action = driver.action(state.index)
            if action == "skip" and not self._skips:
                return "run"
            skipped = skipped or action == "skip"
            return action

        try:
            with contextlib.ExitStack() as stack:
                # The outer no_grad is what grad mode falls back to, whatever a driver switched on in between.
                stack.enter_context(torch.no_grad())
                # What is drawn without a generator by means that KeyedDraws does not know is at least repeated.
                stack.enter_context(torch.random.fork_rng(devices=[]))
                if self.autocast is not None:
                    stack.enter_context(torch.autocast(self.policy.device.type, self.autocast))
                stack.enter_context(self._cache.open())
                stack.enter_context(draws)
                stack.enter_context(self._tap.open(decide, checkpointing, draws.paused, outlived=driver.outlived))
                for owner, name in self._seats:
                    vars(owner)[name] = self._puppet
                return self._call(driver, keys, arguments, conditions)
        except LoopLeft:
            # What the pipeline would have done after its loop.
            for module, processor in processors.items():
                module.processor = processor
            if hasattr(self.policy.pipe, "maybe_free_model_hooks"):
                self.policy.pipe.maybe_free_model_hooks()
            return None
        except (UserError, ParityError, NonFiniteError):
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            for module, processor in processors.items():
                module.processor = processor
            if is_exhausted(error) or not skipped or not driver.restart():
                raise
            # Pipelines that read what the denoiser leaves behind (self-attention guidance) cannot do without it.
            self._skips = False
        finally:
            for (owner, name), native in zip(self._seats, natives, strict=True):
                vars(owner)[name] = native
            state.begin(None)
            self.policy.rest()
        return self._drive(driver, prompts, keys, conditions, steps=steps, checkpointing=checkpointing)

    def _processors(self) -> dict[Any, Any]:
        modules = [m for module in self.policy.denoisers.values() for m in module.modules()]
        return {module: module.processor for module in modules if "processor" in vars(module)}

    def _call(
        self, driver: Any, keys: tuple[SampleKey, ...], arguments: dict[str, Any], conditions: Mapping[str, Any]
    ) -> Any:
        """Call the pipeline in the first form it takes; the form is remembered.

        Forms: a list of prompts with a list of generators; a list of prompts with one generator that stands for all
        (:class:`~difftune.noise.KeyedGenerator`); for one sample, its prompt and conditions without a list around them.
        """
        state = self._puppet._difftune
        forms: Sequence[int] = range(3 if len(keys) == 1 else 2)
        if self._form is not None:
            forms = (self._form,)
        failure: Exception | None = None
        for form in forms:
            torch.default_generator.manual_seed(keyed_generator(keys[0], "global").initial_seed())
            state.begin(driver, len(keys))
            calls = self._tap.calls
            try:
                out = self._unwrapped_if_strict(driver, len(keys), self._in_form(form, keys, arguments, conditions))
            except LoopLeft:
                self._form = form
                raise
            except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
                begun = state.entered or self._tap.calls > calls
                final = isinstance(error, UserError) or is_exhausted(error)
                if begun or final or "output_type" in str(error):
                    raise
                failure = failure or error
            else:
                self._form = form
                return out
        assert failure is not None
        raise failure

    def _in_form(
        self, form: int, keys: tuple[SampleKey, ...], arguments: Mapping[str, Any], conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = dict(arguments)
        if "generator" in self._parameters or self._takes_anything():
            single = form > 0
            given["generator"] = (
                KeyedGenerator.of(keys, "pipeline") if single else [keyed_generator(key, "pipeline") for key in keys]
            )
        if form == 2:
            for name, value in given.items():
                listed = isinstance(value, (list, tuple)) and len(value) == 1
                if listed and (name.endswith("prompt") or name in conditions):
                    given[name] = value[0]
        return given

    def _unwrapped_if_strict(self, driver: Any, batch: int, arguments: dict[str, Any]) -> Any:
        pipe = self.policy.pipe
        try:
            return pipe(**arguments)
        except InferenceModeError as error:
            unwrapped = getattr(type(pipe).__call__, "__wrapped__", None)
            if unwrapped is None:
                raise UserError(
                    f"{type(pipe).__name__} runs {error} inside torch.inference_mode, where nothing can be trained; "
                    "use torch.no_grad there"
                ) from None
            self._puppet._difftune.begin(driver, batch)
            return unwrapped(pipe, **arguments)

    def _about_momentum(self) -> str:
        return (
            f"parity: {type(self.policy.pipe).__name__} carries what it predicts at one step on to the next, as "
            "momentum does, so its steps are no transitions of their own; switch that off in sampler.call"
        )

    # -- the gate ----------------------------------------------------------------------------------------

    def check_parity(self, trajectory: Trajectory, tolerance: float | None = None) -> dict[str, float]:
        """Replay a fresh rollout under unchanged weights and verify what every ratio relies on.

        Verified: |ratio - 1| is within ``tolerance`` at every stochastic step, and at the last of them when it is
        replayed alone; a gradient of the log-probs reaches at
        least one trained parameter; and no other parameter of the pipeline holds a gradient. That some layers get none
        is no error (a pipeline may not use all of them): they are counted. The trained parameters' gradients are
        cleared before and afterwards.

        Nothing is said of other batch sizes: kernels round differently there, and the trainer measures it apart.

        Args:
            trajectory: a rollout of one pipeline call (at most ``batch_size`` samples), made with the current weights.
            tolerance: bound on |ratio - 1|, with ratios of the mean log-prob; by default 0 on the CPU without autocast
                and compilation, whatever the dtype, and 1e-4 elsewhere.

        Returns:
            ``max_ratio_error``; ``steps`` verified; ``grad_norm`` over all trained parameters; ``layers_reached``,
            those with a gradient that is not zero, of ``layers``.

        Raises:
            ParityError: the first step that differs, no gradient anywhere, or the first parameter that is not trained
                and has a gradient.
        """
        params = self.policy.named_parameters()
        exact = self.policy.device.type == "cpu" and self.autocast is None and not self.policy.compiled
        bound = (0.0 if exact else 1e-4) if tolerance is None else tolerance
        errors: dict[int, float] = {}

        def verify(view: StepView) -> None:
            log_ratio = view.log_prob - view.old_log_prob
            errors[view.index] = float((log_ratio.detach().exp() - 1).abs().max())
            (view.log_prob.sum() * view.dims**0.5).backward()

        for parameter in params.values():
            parameter.grad = None
        try:
            self.replay(trajectory, verify)
        except RuntimeError as fault:
            if "backward through the graph a second time" not in str(fault):
                raise
            raise ParityError(self._about_momentum()) from None
        norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in params.items()}
        # By identity: a ControlNet may hold some of the denoiser's own layers (Z-Image).
        own = {id(parameter) for parameter in params.values()}
        strays = [
            f"{component}.{name}"
            for component, module in pipeline_modules(self.policy.pipe).items()
            for name, p in module.named_parameters()
            if p.grad is not None and id(p) not in own
        ]
        for parameter in params.values():
            parameter.grad = None
        for index, error in errors.items():
            if not error <= bound:
                raise ParityError(
                    f"parity: replaying step {index} gave |ratio - 1| = {error:.3g}, expected at most {bound:g}; "
                    "rollout and training do not run the same computation (dropout, guidance, dtype or noise level)"
                )
        if len(errors) > 1:
            # Nothing of the earlier steps is there when one is replayed alone: it must not be missed.
            alone: list[float] = []

            def compare(view: StepView) -> None:
                alone.append(float(((view.log_prob - view.old_log_prob).exp() - 1).abs().max()))

            self.replay(trajectory, compare, [max(errors)], grad=False)
            if not alone[0] <= bound:
                raise ParityError(self._about_momentum())
        # B of a fresh LoRA is zero, so A has a zero gradient: a layer is reached if any of its parameters is.
        layers: dict[str, float] = {}
        for name, norm in norms.items():
            layer = name.split(".lora_")[0]
            layers[layer] = layers.get(layer, 0.0) + norm
        silent = [layer for layer, norm in layers.items() if not norm > 0]
        if len(silent) == len(layers):
            raise ParityError("parity: no gradient reaches any trained parameter; is the denoiser run in no_grad?")
        if strays:
            raise ParityError(f"parity: gradients reach {strays[0]}, which is not trained; freeze it first")
        return {
            "max_ratio_error": max(errors.values()),
            "steps": float(len(errors)),
            "grad_norm": float(sum(n**2 for n in norms.values()) ** 0.5),
            "layers_reached": float(len(layers) - len(silent)),
            "layers": float(len(layers)),
        }


# -- helpers ---------------------------------------------------------------------------------------------


def find_scheduler(pipe: Any) -> list[tuple[Any, str]]:
    """Return where the loop's scheduler sits, as ``(object, attribute)`` pairs: the pipeline and its sub-pipelines.

    A pipeline made of others (Kandinsky combined) holds them as attributes and runs their loops.

    Raises:
        UserError: there is none, or several and none is called ``scheduler``.
    """
    parts = [value for value in vars(pipe).values() if callable(value) and hasattr(value, "scheduler")]
    name = "scheduler" if getattr(pipe, "scheduler", None) is not None else ""
    if not name:
        named = [key for key, value in vars(pipe).items() if hasattr(value, "set_timesteps") and hasattr(value, "step")]
        if len(named) != 1:
            found = "several schedulers: " + ", ".join(named) if named else "no scheduler"
            raise UserError(
                f"{type(pipe).__name__} has {found}; expected one denoising loop, with its scheduler as .scheduler"
            )
        name = named[0]
    native = getattr(pipe, name)
    return [(pipe, name), *((part, "scheduler") for part in parts if part.scheduler is native)]


def _takes_guidance(denoiser: Any) -> bool:
    """Whether guidance is an input of the denoiser, which was distilled for that (FLUX, latent consistency models)."""
    config = getattr(denoiser, "config", None)
    return bool(getattr(config, "guidance_embeds", False) or getattr(config, "time_cond_proj_dim", None))


def _swaps_processors(pipe: Any) -> bool:
    """Whether the call changes attention processors and restores them after its loop (PAG)."""
    try:
        return "set_attn_processor" in inspect.getsource(inspect.unwrap(type(pipe).__call__))
    except (OSError, TypeError):
        return True


def _call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(type(pipe).__call__).parameters)
    parameters.pop("self", None)
    return parameters


def as_argument(pipe: Any, name: str, values: Any, parameters: Mapping[str, inspect.Parameter]) -> Any:
    """Return a condition as a pipeline takes it: pictures opened, equal numbers as the one number they are.

    Args:
        pipe: the pipeline.
        name: the argument of its call.
        values: one per sample; what is no list is returned as it is.
        parameters: of the pipeline's call.

    Raises:
        UserError: the pipeline takes one number where the samples differ.
    """
    if not isinstance(values, (list, tuple)):
        return values
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return [_opened(value, "mask" in name) for value in values]
    parameter = parameters.get(name)
    if parameter is None or not _takes_one_number(parameter):
        return values
    if any(value != values[0] for value in values):
        raise UserError(
            f"prompts: {name} is {values[0]} and {next(v for v in values if v != values[0])}, and "
            f"{type(pipe).__name__} takes one for all; give all prompts the same"
        )
    return values[0]


def _takes_one_number(parameter: inspect.Parameter) -> bool:
    """Whether an argument of a pipeline is a number, not a list of one per sample."""
    kind = str(parameter.annotation).lower()
    if parameter.annotation is not inspect.Parameter.empty and ("list" in kind or "tensor" in kind):
        return isinstance(parameter.default, (int, float))
    return isinstance(parameter.default, (int, float)) or "int" in kind or "float" in kind


def _opened(value: Any, grey: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [_opened(item, grey) for item in value]
    return _picture(value, value.stat().st_mtime_ns, grey) if isinstance(value, Path) else value


@functools.lru_cache(maxsize=256)
def _picture(path: Path, changed: int, grey: bool) -> Any:
    with Image.open(path, formats=PICTURES) as picture:
        return ImageOps.exif_transpose(picture).convert("L" if grey else "RGB")


def _carries_noise(prediction: Prediction, window: Sequence[int] | None) -> bool:
    """Whether a step carries noise: it is inside the window, and its Gaussian has a std above 0."""
    if window is not None:
        if prediction.index not in window:
            return False
    elif prediction.family == "flow" and prediction.lands_on_data():
        return False
    return prediction.transition().std > 0


def _require_finite(values: Tensor, what: str, prompts: Sequence[str]) -> None:
    finite = torch.isfinite(values.flatten(1)).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"rollout: the {what} of sample {bad} (prompt {prompts[bad]!r}) is not finite; lower the learning rate, or "
            "use model.dtype bf16 or fp32 in place of fp16"
        )


#: Fields of diffusers' output classes that hold what was sampled, and whether it is a picture with values in [0, 1].
_OUTPUTS = {
    "images": True,
    "frames": True,
    "rgb": True,
    "image": True,
    "sample": True,
    "audios": False,
    "prediction": False,
    "image_embeds": False,
    "image_embeddings": False,
}


def to_images(out: Any, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn a pipeline's output into images ``(B, 3, H, W)`` or frames ``(B, F, 3, H, W)``, in [0, 1].

    Tensors keep their graph. Understands the output classes of diffusers (``images``, ``frames``), tuples, numpy
    arrays ``(B, H, W, 3)`` and lists of PIL images. What is no picture comes as it is: audio ``(B, channels,
    samples)``, predicted maps, the embeddings of a prior.

    Raises:
        UserError: the output is none of these.
    """
    name = next((name for name in _OUTPUTS if getattr(out, name, None) is not None), None)
    value = getattr(out, name) if name is not None else out[0] if isinstance(out, tuple) else out
    picture = _OUTPUTS.get(name or "images", True)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        value = torch.stack(value)
    if not isinstance(value, Tensor):
        array = np.asarray(value) if isinstance(value, np.ndarray) else _pil_arrays(value)
        if array is None:
            raise UserError(f"the pipeline returned {type(out).__name__}, expected images or frames")
        value = torch.from_numpy(np.ascontiguousarray(array))
        value = value.movedim(-1, -3) if picture else value
        value = value.float() / 255 if array.dtype == np.uint8 else value.float()
    if len(value) != batch or value.ndim < 2 or (picture and value.ndim not in (4, 5)):
        raise UserError(f"the pipeline returned a tensor of shape {tuple(value.shape)} for {batch} prompts")
    if picture and value.ndim == 5 and value.shape[1] in (1, 3) and value.shape[2] not in (1, 3):
        value = value.movedim(1, 2)
    return value.to(dtype).clamp(0, 1) if picture else value.to(dtype)


def _pil_arrays(value: Any) -> np.ndarray | None:
    if isinstance(value, list) and value and isinstance(value[0], list):
        frames = [_pil_arrays(item) for item in value]
        return None if any(f is None for f in frames) else np.stack([f for f in frames if f is not None])
    if isinstance(value, list) and value and hasattr(value[0], "convert"):
        return np.stack([np.asarray(image.convert("RGB")) for image in value])
    return None
