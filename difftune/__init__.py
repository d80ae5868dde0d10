"""difftune: fine-tune diffusion and flow models with rewards.

The public names are loaded on first use, so that ``import difftune`` and ``difftune --help`` import no torch::

    import difftune as dt

    policy = dt.Policy(dt.load_pipeline("difftune/tiny-sd"), lora=dt.LoraConfig(rank=8))
    traj = dt.Sampler(policy, steps=20).rollout(["two yellow stars"], seed=0)

``dt.reward`` is always the decorator, never the submodule of the same name: ``from difftune.reward import X`` and
``import difftune.reward`` work as ever, ``import difftune.reward as r`` binds the decorator.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftune.algorithm import build_algorithm, list_algorithms
    from difftune.policy import LoraConfig, Policy, load_pipeline
    from difftune.reward import build_reward, list_rewards, reward
    from difftune.sampler import Sampler
    from difftune.trainer import Trainer
    from difftune.types import Metrics, RewardOutput, Rollout, Trajectory
    from difftune.zoo import list_models

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "Metrics",
    "Policy",
    "RewardOutput",
    "Rollout",
    "Sampler",
    "Trainer",
    "Trajectory",
    "__version__",
    "build_algorithm",
    "build_reward",
    "list_algorithms",
    "list_models",
    "list_rewards",
    "load_pipeline",
    "reward",
]

_HOME = {
    "LoraConfig": "policy",
    "Metrics": "types",
    "Policy": "policy",
    "RewardOutput": "types",
    "Rollout": "types",
    "Sampler": "sampler",
    "Trainer": "trainer",
    "Trajectory": "types",
    "build_algorithm": "algorithm",
    "build_reward": "reward",
    "list_algorithms": "algorithm",
    "list_models": "zoo",
    "list_rewards": "reward",
    "load_pipeline": "policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'difftune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"difftune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Facade(ModuleType):
    """The package's module, with ``reward`` pinned to the decorator.

    Importing a submodule binds it as an attribute of its package, which would replace ``dt.reward`` by the module.
    A data descriptor on the module's class is looked up first and ignores that binding.
    """

    @property
    def reward(self) -> Any:
        return importlib.import_module("difftune.reward").reward

    @reward.setter
    def reward(self, submodule: object) -> None:
        pass


sys.modules[__name__].__class__ = _Facade
