"""The sampler mathematics against closed forms and against diffusers' own schedulers."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from difftune import transition as tr
from difftune.puppet import Prediction, grid_of, make_puppet
from difftune.transition import Gaussian, Level
from difftune.types import UserError

torch.manual_seed(0)
DOUBLE = torch.float64


# -- closed forms on one-dimensional chains ----------------------------------------------------------------------


def gaussian_chain(steps: int = 50) -> tuple[list[Level], float, float]:
    """Noise levels of a DDPM chain that ends on the data, and the mean and variance of that data."""
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-3, 0.25, steps, dtype=DOUBLE), 0).flip(0).tolist()
    return [Level.vp(a) for a in alpha_bars] + [Level(1.0, 0.0)], 0.3, 0.49


def exact_x0(x: Tensor, level: Level, mean: float, variance: float) -> Tensor:
    """E[x0 | x_t] when the data is N(mean, variance)."""
    gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
    return mean + gain * (x - level.alpha * mean)


def test_ddpm_chain_has_the_exact_mean_and_variance() -> None:
    """C01, the steps alone; in test_closed_forms.py the whole sampler."""
    levels, mu, var = gaussian_chain()
    mean, variance = 0.0, 1.0
    for now, nxt in zip(levels[:-1], levels[1:], strict=True):
        # Each step is affine, so two points give its slope and offset, and moments follow exactly.
        x = torch.tensor([[0.0], [1.0]], dtype=DOUBLE)
        x0 = exact_x0(x, now, mu, var)
        noise = (x - now.alpha * x0) / now.sigma
        step = tr.ddim(x0, noise, now, nxt, eta=1.0)
        offset = float(step.mean[0])
        slope = float(step.mean[1]) - offset
        mean, variance = slope * mean + offset, slope**2 * variance + step.std**2
    assert mean == pytest.approx(0.2998490963, abs=1e-9)
    assert variance == pytest.approx(0.4186846664, abs=1e-9)


@pytest.mark.parametrize(("steps", "expected"), [(10, 1.218207), (100, 1.336066), (1000, 1.348599)])
def test_flow_euler_converges_as_known(steps: int, expected: float) -> None:
    """C02, the steps alone; in test_closed_forms.py the whole sampler."""
    mu, s0 = 0.3, 0.7
    x = torch.tensor([[1.5]], dtype=DOUBLE)
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        spread = (1 - t) ** 2 * s0**2 + t**2
        x0 = mu + (1 - t) * s0**2 / spread * (x - (1 - t) * mu)
        x1 = t / spread * (x - (1 - t) * mu)
        x = tr.flow_ode(x, x1 - x0, t, s).mean
    assert float(x) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_predictions_convert_back_to_the_sample(kind: tr.PredictionType) -> None:
    level = Level.flow(0.3) if kind == "flow" else Level.vp(0.6)
    x0, noise = torch.randn(2, 3, 4, dtype=DOUBLE), torch.randn(2, 3, 4, dtype=DOUBLE)
    x = tr.add_noise(x0, noise, level)
    output = {
        "epsilon": noise,
        "v_prediction": level.alpha * noise - level.sigma * x0,
        "sample": x0,
        "flow": noise - x0,
    }[kind]
    got_x0, got_noise = tr.split_prediction(output, x, level, kind)
    torch.testing.assert_close(got_x0, x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(got_noise, noise, atol=1e-12, rtol=0)


def test_log_prob_sum_mean_and_gradient() -> None:
    """C06: the density's logarithm, its d-th part, and their slope (x' - mu) / S^2."""
    mean = torch.randn(3, 4, 2, dtype=DOUBLE, requires_grad=True)
    x, std = torch.randn(3, 4, 2, dtype=DOUBLE), 0.7
    step = Gaussian(mean, std)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(step.log_prob(x, "sum"), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(step.log_prob(x, "mean"), expected / 8, atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(step.log_prob(x, "sum").sum(), mean)
    torch.testing.assert_close(grad, (x - mean) / std**2, atol=1e-12, rtol=0)


def test_log_prob_leaves_masked_dimensions_out() -> None:
    mean, x = torch.randn(2, 4, dtype=DOUBLE), torch.randn(2, 4, dtype=DOUBLE)
    mask = torch.tensor([[True, False, True, False]])
    masked, half = Gaussian(mean, 0.5, mask), Gaussian(mean[:, ::2], 0.5)
    torch.testing.assert_close(masked.log_prob(x, "sum"), half.log_prob(x[:, ::2], "sum"), atol=1e-12, rtol=0)
    torch.testing.assert_close(masked.kl(Gaussian(x, 0.9), "sum"), half.kl(Gaussian(x[:, ::2], 0.9), "sum"))
    # The mean is the sum by all four dimensions, so that samples with other masks keep the same unit.
    torch.testing.assert_close(4 * masked.log_prob(x), masked.log_prob(x, "sum"), atol=1e-12, rtol=0)


def test_kl_matches_torch() -> None:
    a, b = Gaussian(torch.randn(3, 5, dtype=DOUBLE), 0.4), Gaussian(torch.randn(3, 5, dtype=DOUBLE), 0.9)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a.mean, a.std), normal(b.mean, b.std)).sum(1)
    torch.testing.assert_close(a.kl(b, "sum"), expected, atol=1e-12, rtol=0)


def test_kl_of_flow_sde_steps_has_its_closed_form() -> None:
    """C75, in the unit of the sum: |dt| / 2 (g (1 - t) / (2 t) + 1 / g)^2 |v - v'|^2."""
    x, v, other = (torch.randn(2, 6, dtype=DOUBLE) for _ in range(3))
    t, s, eta = 0.6, 0.5, 0.7
    g = eta * math.sqrt(t / (1 - t))
    p, q = tr.flow_sde(x, v, t, s, eta, 0.9), tr.flow_sde(x, other, t, s, eta, 0.9)
    expected = (t - s) / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2 * (v - other) ** 2
    torch.testing.assert_close(p.kl(q, "sum"), expected.sum(1), atol=1e-12, rtol=0)


def test_dance_with_flow_grpos_noise_is_flow_grpos_step() -> None:
    """C74."""
    x, v = torch.randn(2, 6, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)
    t, s = 0.7, 0.6
    flow = tr.flow_sde(x, v, t, s, 0.7, 0.9)
    dance = tr.dance_sde(x, v, t, s, 0.7 * math.sqrt(t / (1 - t)))
    torch.testing.assert_close(dance.mean, flow.mean, atol=1e-12, rtol=0)
    assert dance.std == pytest.approx(flow.std, abs=1e-12)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_no_noise_is_the_ode_step_and_has_no_log_prob(name: str) -> None:
    """C76."""
    x, v = torch.randn(2, 6), torch.randn(2, 6)
    step = tr.FLOW_DYNAMICS[name](x, v, 0.7, 0.6, 0.0, 0.9)
    ode = tr.flow_ode(x, v, 0.7, 0.6).mean
    if name == "cps":  # the same step, written through x0 and x1
        torch.testing.assert_close(step.mean, ode, atol=1e-6, rtol=0)
    else:
        assert torch.equal(step.mean, ode)
    with pytest.raises(ValueError, match="ODE step"):
        step.log_prob(x)
    with pytest.raises(ValueError, match="ODE step"):
        step.kl(step)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_flow_steps_keep_the_marginal_of_a_gaussian(name: str) -> None:
    """With the exact velocity of N(mu, s0^2) data, a small step lands on the marginal of its time, up to O(dt)."""
    mu, s0, t = 0.3, 0.7, 0.6
    errors = []
    for dt in (0.02, 0.01):
        s = t - dt
        spread = (1 - t) ** 2 * s0**2 + t**2
        x = torch.tensor([[0.0], [1.0]], dtype=DOUBLE)
        x0 = mu + (1 - t) * s0**2 / spread * (x - (1 - t) * mu)
        x1 = t / spread * (x - (1 - t) * mu)
        step = tr.FLOW_DYNAMICS[name](x, x1 - x0, t, s, 0.5, 0.9)
        offset = float(step.mean[0])
        slope = float(step.mean[1]) - offset
        mean, variance = slope * (1 - t) * mu + offset, slope**2 * spread + step.std**2
        errors.append(abs(mean - (1 - s) * mu) + abs(variance - ((1 - s) ** 2 * s0**2 + s**2)))
    # Local error of second order: halving the step divides it by four.
    assert errors[1] < 0.3 * errors[0]


def test_cps_keeps_the_noise_level() -> None:
    x0, x1, t, s = torch.zeros(1, 1, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE), 0.7, 0.5
    step = tr.cps(t * x1 + (1 - t) * x0, x1 - x0, t, s, 0.6)
    assert float(step.mean) ** 2 + step.std**2 == pytest.approx(s**2, abs=1e-12)
    assert step.std == pytest.approx(s * math.sin(0.3 * math.pi), abs=1e-12)


# -- diffusers' own schedulers -----------------------------------------------------------------------------------


class Feeder:
    """A driver that returns the mean plus given noise."""

    def __init__(self, noise: list[Tensor] | None = None) -> None:
        self.noise = noise
        self.seen: list[Prediction] = []

    def timesteps(self, scheduler: Any) -> None:
        pass

    def step(self, prediction: Prediction) -> Tensor:
        self.seen.append(prediction)
        gaussian = prediction.transition()
        noise = torch.zeros_like(gaussian.mean) if self.noise is None else self.noise[prediction.index]
        return gaussian.sample(noise).to(prediction.sample.dtype)


def model(x: Tensor, t: Any) -> Tensor:
    """Any smooth function of sample and time stands in for the network."""
    return torch.tanh(x + 0.1) * (0.5 + float(t) / 2000)


def drive(scheduler: Any, steps: int, extra: dict[str, Any] | None = None) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    out = []
    for k, t in enumerate(scheduler.timesteps):
        given = {name: value(k) if callable(value) else value for name, value in (extra or {}).items()}
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(inputs, t), t, x, **given, return_dict=False)[0]
        out.append(x)
    return out


VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOISE = [torch.randn(2, 4, 8, 8) for _ in range(20)]


def compare(native: Any, dynamics: str, level: float, bound: float, noise: bool, **step: Any) -> None:
    steps = 8
    expected = drive(native, steps, step)
    puppet = make_puppet(native, dynamics, level)
    puppet._difftune.driver = Feeder(NOISE if noise else None)
    got = drive(puppet, steps)
    assert len(got) == len(expected)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        scale = max(1.0, float(b.abs().max()))
        assert float((a - b).abs().max()) <= bound * scale, f"step {k}"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("final_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(prediction: str, spacing: str, final_one: bool, eta: float) -> None:
    native = diffusers.DDIMScheduler(
        **VP, clip_sample=False, set_alpha_to_one=final_one, steps_offset=1 if spacing == "leading" else 0,
        timestep_spacing=spacing, prediction_type=prediction,
    )  # fmt: skip
    noise = {} if eta == 0 else {"variance_noise": lambda k: NOISE[k]}
    compare(native, "ddim", eta, 2e-5, eta > 0, eta=eta, **noise)


def test_ddim_clips_x0_as_diffusers_does() -> None:
    compare(diffusers.DDIMScheduler(**VP, clip_sample=True, clip_sample_range=0.5), "ddim", 0.0, 2e-5, False, eta=0.0)


def test_ddim_without_offset_ends_on_a_step_without_noise() -> None:
    native = diffusers.DDIMScheduler(**VP, set_alpha_to_one=False, steps_offset=0, clip_sample=False)
    puppet = make_puppet(native, "ddim", 1.0)
    puppet._difftune.driver = Feeder()
    drive(puppet, 5)
    stds = [p.transition().std for p in puppet._difftune.driver.seen]
    assert stds[-1] == 0 and all(s > 0 for s in stds[:-1])


@pytest.mark.parametrize("clip", [False, True])
def test_eta_one_is_ddpms_posterior(clip: bool) -> None:
    native = diffusers.DDPMScheduler(**VP, clip_sample=clip, variance_type="fixed_small")
    native.set_timesteps(10)
    puppet = make_puppet(native, "ddim", 1.0)
    puppet._difftune.driver = Feeder()
    puppet.set_timesteps(10)
    x, t = torch.randn(2, 4, 8, 8), native.timesteps[3]
    got = puppet.step(model(x, t), t, x)
    step = puppet._difftune.driver.seen[0].transition()
    # DDPM adds its noise inside step(): with the noise's sign flipped the mean is the average of the two.
    a = native.step(model(x, t), t, x, generator=torch.Generator().manual_seed(5)).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    variance = float(native._get_variance(int(t)))
    torch.testing.assert_close(a - variance**0.5 * noise, got.prev_sample, atol=2e-5, rtol=0)
    assert step.std == pytest.approx(variance**0.5, rel=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_ode_equals_diffusers_euler_to_the_bit(shift: float) -> None:
    compare(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), "ode", 0.0, 0.0, False)


def test_lcm_equals_diffusers() -> None:
    native = diffusers.LCMScheduler(**VP)
    expected: list[Tensor] = []
    native.set_timesteps(4)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    generator, noises = torch.Generator().manual_seed(7), []
    for k, t in enumerate(native.timesteps):
        state = generator.get_state()
        x = native.step(model(x, t), t, x, generator=generator, return_dict=False)[0]
        generator.set_state(state)
        noises.append(torch.randn(x.shape, generator=generator) if k < 3 else torch.zeros_like(x))
        expected.append(x)
    puppet = make_puppet(diffusers.LCMScheduler(**VP))
    puppet._difftune.driver = Feeder(noises)
    got = drive(puppet, 4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_exploding_levels_equal_diffusers_euler(prediction: str) -> None:
    compare(diffusers.EulerDiscreteScheduler(**VP, prediction_type=prediction), "ode", 0.0, 2e-4, False)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_multistep_schedulers_keep_their_grid_and_step_in_first_order(kind: str) -> None:
    extra = {"solver_order": 1, "lower_order_final": True}
    native = getattr(diffusers, kind)(**VP, **extra)
    if kind.startswith("UniPC"):
        # Its corrector is second order: compare the grid, which is what must survive.
        native.set_timesteps(8)
        puppet = make_puppet(native, "ode", 0.0)
        puppet._difftune.driver = Feeder()
        drive(puppet, 8)
        for p, sigma in zip(puppet._difftune.driver.seen, native.sigmas.tolist(), strict=False):
            assert p.now.sigma / p.now.alpha == pytest.approx(sigma, rel=1e-5)
    else:
        compare(native, "ode", 0.0, 5e-5, False)


def test_flow_shift_of_a_multistep_scheduler_survives() -> None:
    native = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    puppet = make_puppet(native, "auto", 0.7)
    assert puppet._difftune.dynamics == "flow_sde"
    puppet._difftune.driver = Feeder()
    drive(puppet, 6)
    native.set_timesteps(6)
    assert [p.now.sigma for p in puppet._difftune.driver.seen] == pytest.approx(native.sigmas[:-1].tolist())


def test_pndm_visits_each_timestep_once() -> None:
    native = diffusers.PNDMScheduler(**VP, skip_prk_steps=True, steps_offset=1)
    puppet = make_puppet(native, "ddim", 0.0)
    puppet._difftune.driver = Feeder()
    got = drive(puppet, 10)
    ddim = diffusers.DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    expected = drive(ddim, 10, {"eta": 0.0})
    assert len(got) == 10
    torch.testing.assert_close(got[-1], expected[-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_two_call_solvers_are_refused_with_a_substitute(kind: str) -> None:
    with pytest.raises(UserError, match="set model.scheduler: .*Euler"):
        grid_of(getattr(diffusers, kind)())


def test_dynamics_of_another_family_is_refused() -> None:
    with pytest.raises(UserError, match="expected one of auto, flow_sde"):
        make_puppet(diffusers.FlowMatchEulerDiscreteScheduler(), "ddim")


def test_the_puppet_keeps_class_and_signatures() -> None:
    import inspect

    native = diffusers.DDIMScheduler(**VP)
    puppet = make_puppet(native)
    assert isinstance(puppet, diffusers.DDIMScheduler)
    assert inspect.signature(puppet.step) == inspect.signature(native.step)
    assert inspect.signature(puppet.set_timesteps) == inspect.signature(native.set_timesteps)
