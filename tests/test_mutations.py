"""Each error of a list is planted, and a named check sees it: a suite that passes with the error in is worth nothing.

Every case is (what is planted, the check): the check must pass on the code as it is and fail with the plant in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import chains
import pytest
import test_adjoint_matching
import test_forward
import test_groups
import test_preferences
import test_rdp
import test_reward_gradient
import test_transition
import test_weighted
import tiny
import torch

import difftune.advantage as advantage
import difftune.algorithm as contract
from difftune import transition
from difftune.algorithms import (
    awm,
    d3po,
    ddpo,
    diffusion_dpo,
    dpok,
    draft,
    drtune,
    grpo,
    kto,
    nft,
    raft,
    rdp,
    refl,
    rwr,
    seppo,
)
from difftune.policy import LoraConfig, Policy
from difftune.sampler import Sampler
from difftune.transition import Gaussian

Plant = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]


def fails(check: Check) -> bool:
    try:
        check()
    except (AssertionError, RuntimeError, pytest.fail.Exception):
        return True
    return False


def ratio_against_reference(patch: pytest.MonkeyPatch) -> None:
    """1: the ratio is to the reference where the sampling policy's belongs."""
    for method in (ddpo.DDPO, dpok.DPOK, grpo.GRPO):

        def planted(self: Any, batch: Any, context: Any, original: Any = method.accumulate) -> Any:
            log_probs = batch.trajectory.log_probs.clone()
            with context.policy.reference():
                for k, base in context.sampler.transitions(batch.trajectory).items():
                    log_probs[:, k] = base.log_prob(batch.trajectory.step_out(k))
            wrong = dataclasses.replace(batch.trajectory, log_probs=log_probs)
            return original(self, dataclasses.replace(batch, trajectory=wrong), context)

        patch.setattr(method, "accumulate", planted)


def three_policies(name: str, reward_weight: float = 1.0) -> Check:
    return lambda: test_groups.test_ratios_are_to_what_sampled_and_the_kl_is_to_the_base(name, reward_weight, "flow")


def reference_not_frozen(patch: pytest.MonkeyPatch) -> None:
    """2: the DPO reference moves with the policy."""
    patch.setattr(Policy, "reference", lambda self: self.adapter("default"))


def reference_moves_the_loss() -> None:
    """After the weights have moved, the loss is no longer ln 2."""
    for name in ("diffusion_dpo", "d3po"):
        sampler = chains.sampler("flow")
        sampler.policy.parameters()[0].data += 0.2
        metrics = test_preferences.accumulate(contract.build_algorithm(name), sampler, ["a", "a"], [[0, 1]])
        assert abs(metrics["loss"] - math.log(2)) > 1e-5, name


def guidance_off_in_training(patch: pytest.MonkeyPatch) -> None:
    """3: guidance is on in sampling and off in training."""
    original = Sampler.replay

    def planted(self: Any, *args: Any, **settings: Any) -> None:
        kept = dict(self._fixed)
        self._fixed["guidance_scale"] = 1.0
        try:
            original(self, *args, **settings)
        finally:
            self._fixed = kept

    patch.setattr(Sampler, "replay", planted)


def guided_ratios_are_one() -> None:
    """Under guidance the replay gives the rollout's own log-probs, to the bit."""
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    sampler = Sampler(policy, steps=3, guidance_scale=4.0, eta=1.0)
    assert sampler.check_parity(sampler.rollout(["a red cat"]))["max_ratio_error"] == 0


def drift_of_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    """9: the SDE's correction of the drift has the wrong sign."""
    original = transition.FLOW_DYNAMICS["flow_sde"]

    def planted(x: Any, v: Any, t: float, s: float, eta: float, below_one: float) -> Gaussian:
        step = original(x, v, t, s, eta, below_one)
        return dataclasses.replace(step, mean=2 * transition.flow_ode(x, v, t, s).mean - step.mean)

    patch.setitem(transition.FLOW_DYNAMICS, "flow_sde", planted)


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """4: a step's log-prob is summed over dimensions where the mean is meant."""
    original = Gaussian.log_prob
    patch.setattr(Gaussian, "log_prob", lambda self, x, reduce="sum": original(self, x, reduce))


def two_passes_in_the_mean() -> None:
    sampler = chains.sampler("diffusion")
    traj = sampler.rollout(["a"])
    view_log_prob: list[torch.Tensor] = []
    sampler.replay(traj, lambda view: view_log_prob.append(view.log_prob.detach()))
    gaussians = sampler.transitions(traj)
    for k, log_prob in zip(traj.stochastic_steps, view_log_prob, strict=True):
        normal = torch.distributions.Normal(gaussians[k].mean, gaussians[k].std)
        torch.testing.assert_close(log_prob, normal.log_prob(traj.step_out(k)).mean(1), atol=1e-4, rtol=1e-4)


def noise_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """5: winner and loser get different noise."""
    patch.setattr(diffusion_dpo.DiffusionDPO, "shared_noise", False)


def negative_with_one_minus_beta(patch: pytest.MonkeyPatch) -> None:
    """6: NFT's v- is written with (1 - beta)."""
    patch.setattr(nft, "mixtures", lambda p, old, beta: ((1 - beta) * old + beta * p, (1 - beta) * old - beta * p))


def truncation_one_early(patch: pytest.MonkeyPatch) -> None:
    """10: truncation is off by one."""
    original = Sampler.backprop

    def planted(self: Any, prompts: Any, **settings: Any) -> Any:
        settings["grad_steps"] = [max(k - 1, 0) for k in settings["grad_steps"]]
        return original(self, prompts, **settings)

    patch.setattr(Sampler, "backprop", planted)


def sample_std(patch: pytest.MonkeyPatch) -> None:
    """12: the group's std with the other ddof."""
    patch.setattr(advantage, "_spread", lambda values: (values.mean(), values.std(correction=1)))


def population_std() -> None:
    got = advantage.normalize_groups(torch.tensor([1.0, 3.0]), ["a", "a"])
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0)


def temperature_divides(patch: pytest.MonkeyPatch) -> None:
    """13: RWR's beta divides where it multiplies."""
    original = advantage.exponential_weights
    patch.setattr(rwr, "exponential_weights", lambda r, scale, prompts=None: original(r, 1 / scale, prompts))


def kl_of_unscaled_means(patch: pytest.MonkeyPatch) -> None:
    """14: the KL is a squared difference of means, not divided by the step's variance."""
    patch.setattr(Gaussian, "kl", lambda self, other: (self.mean - other.mean).square().flatten(1).mean(1))


def smaller_loss(patch: pytest.MonkeyPatch) -> None:
    """PRDP takes the smaller of its two losses."""
    patch.setattr(rdp.torch, "maximum", torch.minimum)


def opposite_tail(patch: pytest.MonkeyPatch) -> None:
    """RAFT keeps the worst."""
    original = advantage.best_of_groups
    patch.setattr(raft, "best_of_groups", lambda r, p, keep=1: original(-r, p, keep))


def ppo_for_clamp(patch: pytest.MonkeyPatch) -> None:
    """DPOK's plain clamp becomes PPO's maximum."""
    patch.setattr(dpok, "clamped_loss", contract.importance_sampling_loss)


def clamp_for_ppo(patch: pytest.MonkeyPatch) -> None:
    """DDPO's maximum becomes a plain clamp."""
    patch.setattr(ddpo, "importance_sampling_loss", dpok.clamped_loss)


def guard_without_its_bias(patch: pytest.MonkeyPatch) -> None:
    """GRPO-Guard scales the log-ratio and forgets to take its bias away."""
    patch.setattr(test_groups, "guarded_log_ratio", lambda log_ratio, mean, old_mean, std: std * log_ratio)


def guard_without_the_steps_size(patch: pytest.MonkeyPatch) -> None:
    """GRPO-Guard does not divide by |dt|."""
    patch.setattr(grpo, "step_size", lambda sampler, trajectory, view: 1.0)


def desirable_and_undesirable_swapped(patch: pytest.MonkeyPatch) -> None:
    """KTO raises what it should lower."""
    original = kto.utility_loss
    patch.setattr(kto, "utility_loss", lambda gain, label, baseline, beta: original(gain, -label, baseline, beta))


def flipper_flipped(patch: pytest.MonkeyPatch) -> None:
    """SePPO's criterion has the other sign."""
    original = seppo.anchor_sign
    patch.setattr(seppo, "anchor_sign", lambda gain, form: -original(gain, form))


def reference_sample_always_wins(patch: pytest.MonkeyPatch) -> None:
    """SePPO adds the reference sample's term where it should subtract it."""
    original = seppo.semi_policy_loss
    patch.setattr(seppo, "semi_policy_loss", lambda w, r, s, beta: original(w, r, -s, beta))


def noise_of_the_sample(patch: pytest.MonkeyPatch) -> None:
    """Samples of a prompt do not share x_T though they are asked to."""
    original = Sampler.__init__

    def planted(self: Any, *args: Any, initial_noise: str = "sample", **settings: Any) -> None:
        original(self, *args, **settings)

    patch.setattr(Sampler, "__init__", planted)


def stop_one_step_late(patch: pytest.MonkeyPatch) -> None:
    """DRTune stops a step after the one it drew."""
    original = drtune.middle_step
    patch.setattr(drtune, "middle_step", lambda bounds, steps, generator: original(bounds, steps, generator) + 1)


def winners_and_losers_swapped(patch: pytest.MonkeyPatch) -> None:
    """D3PO prefers the loser."""
    original = d3po.preference_logit
    patch.setattr(d3po, "preference_logit", lambda w, x, beta, clip: original(x, w, beta, clip))


def inputs_not_stopped(patch: pytest.MonkeyPatch) -> None:
    """DRTune's denoiser sees the sample's graph."""
    patch.setattr(drtune, "_detached", lambda value: value)


def one_step_early(patch: pytest.MonkeyPatch) -> None:
    """ReFL predicts one step before the one it drew."""
    original = refl.middle_step
    patch.setattr(refl, "middle_step", lambda bounds, steps, generator: original(bounds, steps, generator) - 1)


def kl_rewarded(patch: pytest.MonkeyPatch) -> None:
    """DPOK's KL has the other sign: the further from the base model, the better."""
    original = dpok.add_kl
    patch.setattr(dpok, "add_kl", lambda loss, stats, view, base, w: original(loss, stats, view, base, -w))


def kl_dropped(patch: pytest.MonkeyPatch) -> None:
    """GRPO measures its KL and leaves it out of the loss."""
    original = grpo.add_kl
    patch.setattr(grpo, "add_kl", lambda loss, stats, view, base, w: original(loss, stats, view, base, 0 * w))


def distances_rewarded(patch: pytest.MonkeyPatch) -> None:
    """AWM's distances have the other sign."""
    original = awm.squared_error
    patch.setattr(awm, "squared_error", lambda predicted, truth, space: -original(predicted, truth, space))


def nft_rewards_distance(patch: pytest.MonkeyPatch) -> None:
    """NFT's distance to the base model has the other sign."""
    original = nft.squared_error
    patch.setattr(nft, "squared_error", lambda predicted, truth, space: -original(predicted, truth, space))


def clip_left_out(patch: pytest.MonkeyPatch) -> None:
    """NFT's loss is not multiplied by c."""
    original = nft.contrastive_loss
    patch.setattr(nft, "contrastive_loss", lambda *args: original(*args) / 5.0)


def baseline_below_zero(patch: pytest.MonkeyPatch) -> None:
    """KTO's baseline is the mean gain itself, without max(0, .)."""

    class Unbounded(torch.Tensor):
        def clamp(self, *args: Any, **bounds: Any) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    original = kto.unit_means
    patch.setattr(kto, "unit_means", lambda values, units: original(values, units).as_subclass(Unbounded))


def noised_alike(patch: pytest.MonkeyPatch) -> None:
    """DRaFT-LV's draws get the same noise, so that they are one draw."""
    original = draft.keyed_noise
    patch.setattr(draft, "keyed_noise", lambda keys, stream, like: original(keys, "draft", like))


def adjoint_of_the_tuned_model(patch: pytest.MonkeyPatch) -> None:
    """11: the adjoint goes through the fine-tuned model in place of the base model."""
    patch.setattr(Policy, "reference", lambda self: self.adapter("default"))


def adjoint_knows_the_base_model() -> None:
    """With a policy whose slope in x differs, the adjoint is still the base model's."""
    sampler, algorithm, batch, context = test_adjoint_matching.setup()
    brain = sampler.policy.pipe.brain
    forward = brain.forward
    # A policy that also scales its output, which the base model (shift 0) does not.
    brain.forward = lambda x, t: forward(x, t) * (1 + brain.shift.abs().max())
    sampler.policy.parameters()[0].data += 0.3
    adjoint = algorithm.adjoints(batch, context)[30]
    expected = torch.full((3, 1), -2.0 * 0.8 * test_adjoint_matching.KAPPA[30], dtype=torch.float64)
    torch.testing.assert_close(adjoint.double(), expected, atol=1e-5, rtol=1e-4)


CASES: list[tuple[Plant, Check]] = [
    (ratio_against_reference, three_policies("ddpo")),
    (ratio_against_reference, three_policies("dpok", 10.0)),
    (ratio_against_reference, three_policies("grpo")),
    (kl_rewarded, three_policies("dpok", 10.0)),
    (kl_dropped, three_policies("grpo")),
    (distances_rewarded, lambda: test_forward.test_awms_loss_is_the_ratio_and_two_distances((0.7, 0.0))),
    (distances_rewarded, lambda: test_forward.test_awms_loss_is_the_ratio_and_two_distances((0.0, 1.3))),
    (nft_rewards_distance, lambda: test_forward.test_nfts_loss_is_its_expansion(2.0, 0.5, 2.0)),
    (clip_left_out, lambda: test_forward.test_nfts_loss_is_its_expansion(5.0, 1.0, 0.3)),
    (baseline_below_zero,
     lambda: test_preferences.test_ktos_loss_measures_gains_from_what_is_gained_on_the_whole(-0.4)),
    (noised_alike, test_reward_gradient.test_draft_lvs_further_draws_are_noised_anew),
    (reference_not_frozen, reference_moves_the_loss),
    (guidance_off_in_training, guided_ratios_are_one),
    (drift_of_the_other_sign, lambda: test_transition.test_flow_steps_keep_the_marginal_of_a_gaussian("flow_sde")),
    (mean_for_sum, two_passes_in_the_mean),
    (noise_of_its_own, lambda: test_preferences.test_a_pair_shares_noise_and_level("flow")),
    (negative_with_one_minus_beta, test_forward.test_the_mixtures_are_symmetric_about_the_old_policy),
    (truncation_one_early,
     lambda: test_reward_gradient.test_the_last_k_steps_and_no_others_are_differentiated("flow", 3)),
    (adjoint_of_the_tuned_model, adjoint_knows_the_base_model),
    (sample_std, population_std),
    (temperature_divides, test_weighted.test_rwrs_beta_multiplies_the_reward),
    (kl_of_unscaled_means, test_groups.test_the_kl_of_two_sde_steps_is_the_papers),
    (smaller_loss, lambda: test_rdp.test_the_gate_stops_only_what_clipping_makes_worse(5.0, True)),
    (opposite_tail, test_weighted.test_raft_keeps_the_best_and_skips_prompts_without_one),
    (ppo_for_clamp, test_groups.test_dpoks_loss_is_the_plain_clamp_and_ddpos_the_maximum),
    (clamp_for_ppo, test_groups.test_dpoks_loss_is_the_plain_clamp_and_ddpos_the_maximum),
    (guard_without_its_bias, test_groups.test_the_guard_leaves_the_noise_times_the_shift),
    (guard_without_the_steps_size, lambda: test_groups.test_the_guard_divides_by_the_steps_size("flow")),
    (desirable_and_undesirable_swapped, lambda: test_preferences.test_ktos_utility_at_the_reference(1.0)),
    (flipper_flipped, test_preferences.test_the_anchor_says_who_fits_the_winner_better),
    (reference_sample_always_wins,
     lambda: test_preferences.test_a_reference_sample_is_a_loser_or_another_winner(1.0, 1.0)),
    (noise_of_the_sample, lambda: test_rdp.test_at_the_optimum_only_the_initial_noise_is_left("prompt")),
    (stop_one_step_late, lambda: test_reward_gradient.test_an_early_stop_scores_what_the_step_predicts(3)),
    (winners_and_losers_swapped, lambda: test_preferences.test_d3pos_gradient_ends_at_the_clamp(0.0, -0.05)),
    (inputs_not_stopped,
     lambda: test_reward_gradient.test_stopped_inputs_leave_the_schedulers_linear_terms("diffusion")),
    (one_step_early, test_reward_gradient.test_refls_gradient_is_its_formula),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "check"), CASES, ids=[plant.__name__ for plant, _ in CASES])
def test_a_planted_error_is_seen(plant: Plant, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fails(check), "the check fails without the error"
    plant(monkeypatch)
    assert fails(check), f"nothing saw: {plant.__doc__}"


def test_every_error_of_the_list_is_planted() -> None:
    """The list has fourteen; 7 and 8 are errors of steering by particles, which is no training."""
    numbers = [int(found[1]) for plant, _ in CASES if (found := re.match(r"(\d+):", plant.__doc__ or ""))]
    assert set(numbers) == set(range(1, 15)) - {7, 8}
