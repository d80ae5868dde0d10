r"""DRaFT: direct reward fine-tuning (Clark et al. 2023, arXiv 2309.17400): DRaFT-K and DRaFT-LV.

DRaFT-K follows the reward's gradient through the last K sampling steps,

.. math::  \nabla_\theta\, r\big(x_0(\theta), c\big) \quad\text{with } x_K \text{ a constant};

K = 1 is the paper's best trade of quality and cost. DRaFT-LV lowers the variance of K = 1: the finished sample, a
constant, is noised n more times to the last timestep, and the gradients of all predictions are averaged,

.. math::  x_1^{(j)} = \alpha_1\, \mathrm{sg}(x_0) + \sigma_1 \epsilon^{(j)}, \qquad
           \tfrac{1}{n+1} \sum_{j=0}^{n} \nabla_\theta\, r\big(\hat x_0(x_1^{(j)})\big).

Which variant this is. Read from the paper's abstract and reviews, its defaults from memory (50 DDIM steps, guidance
7.5, LoRA). In DRaFT-LV every draw, the first too, scores the model's prediction of the clean sample, which is where a
step that lands on the data goes. On flow models both run as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor

from difftune.algorithm import Batch, Context, GradientAlgorithm, GradientConfig, Plan, algorithm
from difftune.noise import keyed_noise
from difftune.reward import Reward
from difftune.sampler import PointView, Sampler
from difftune.transition import add_noise, working
from difftune.types import UserError


class DRaFTConfig(GradientConfig):
    """DRaFT's settings."""

    last_steps: int = Field(1, ge=1, description="K, the last steps that are differentiated (paper: 1).")
    renoised: int = Field(0, ge=0, description="n, further draws of the last step (DRaFT-LV: 2; 0: DRaFT-K).")


@algorithm("draft")
class DRaFT(GradientAlgorithm):
    """DRaFT-K and DRaFT-LV; see the module's docstring."""

    paper = "Directly Fine-Tuning Diffusion Models on Differentiable Rewards, Clark et al. 2023, arXiv 2309.17400"
    Config = DRaFTConfig

    def check(self, sampler: Sampler, reward: Reward, plan: Plan) -> None:
        """Refuse DRaFT-LV through several steps, and more steps than there are."""
        super().check(sampler, reward, plan)
        if self.config.renoised and self.config.last_steps > 1:
            raise UserError(
                f"algorithm.renoised: DRaFT-LV is defined for one step, got last_steps {self.config.last_steps}; set "
                "last_steps to 1 or renoised to 0"
            )
        if self.config.last_steps > sampler.steps:
            raise UserError(
                f"algorithm.last_steps: got {self.config.last_steps}, expected at most sampler.steps ({sampler.steps})"
            )

    def draws(self, batch: Batch, context: Context) -> Iterator[tuple[Tensor, float]]:
        """Yield the sample, and for DRaFT-LV the pictures predicted from its re-noised copies."""
        sampler, count = context.sampler, self.config.renoised
        if count == 0:
            length = sampler.loop_length(batch.prompts, batch.keys, batch.conditions)
            steps = range(max(length - self.config.last_steps, 0), length)
            yield sampler.backprop(batch.prompts, keys=batch.keys, conditions=batch.conditions, grad_steps=steps), 1.0
            return
        trajectory = sampler.rollout(batch.prompts, keys=batch.keys, conditions=batch.conditions, decode=False)
        timestep = float(trajectory.times[-1])
        x0 = working(trajectory.states[:, -1])
        points = [working(trajectory.states[:, -2])]
        for number in range(count):
            noise = keyed_noise(batch.keys, f"draft{context.step}.{number}", x0)
            points.append(add_noise(x0, noise, sampler.level(timestep)))
        for x_t in points:
            found: list[PointView] = []
            sampler.probe(
                batch.prompts, [(timestep, x_t)], found.append, keys=batch.keys, conditions=batch.conditions
            )
            yield sampler.decode(found[0].x0, batch.prompts, batch.keys, batch.conditions), 1.0 / (count + 1)
