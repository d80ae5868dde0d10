"""The tree of a whole run. Unknown keys are errors everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from difftune.config.memory_presets import PresetName, with_preset
from difftune.config.messages import Problems, located
from difftune.config.named import checked_algorithm, checked_reward
from difftune.config.sections import EvaluateConfig, PromptsConfig, SamplerConfig, load_split
from difftune.memory import Compile
from difftune.monitor import MonitorConfig
from difftune.policy import LoraConfig, ModelConfig
from difftune.registry import nearest
from difftune.trainer import TrainerConfig
from difftune.types import UserError
from difftune.zoo import MODELS


def _under(key: str) -> BeforeValidator:
    """Return a validator that reads a bare value as the mapping ``{key: value}``."""
    return BeforeValidator(lambda value: value if isinstance(value, (Mapping, BaseModel)) else {key: value})


class RunConfig(BaseModel):
    """A whole run. Unknown keys are errors everywhere."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: Annotated[ModelConfig, _under("id")] = Field(
        description="An embedded model, a hub id or a folder; or a mapping with id and how to load it."
    )
    lora: LoraConfig | None = Field(
        default_factory=LoraConfig,
        description="The adapter that is trained; null trains every weight of the denoiser.",
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="How samples are drawn.")
    reward: Any = Field(description="A reward's name, a mapping with name, weight and settings, or a list of those.")
    algorithm: Any = Field(description="An algorithm's name, or a mapping with name and its settings.")
    prompts: Annotated[PromptsConfig, _under("source")] = Field(
        description="A built-in set, a file or a list; or a mapping with source, size, seed and held_out."
    )
    train: TrainerConfig = Field(
        default_factory=lambda: TrainerConfig.model_validate({}), description="How long and how large the run is."
    )
    evaluate: EvaluateConfig | None = Field(
        None, description="Evaluation on held-out prompts after training; null: none."
    )
    monitor: MonitorConfig | None = Field(
        None, description="Rewards that are watched, not trained on: a list, or a mapping with when to raise the alarm."
    )
    out: str | None = Field(None, description="The run's folder; null: runs/ and the configuration's name.")
    plugins: list[str] = Field(
        default_factory=list, description="Python files with rewards or algorithms, relative to the configuration."
    )
    preset: PresetName | None = Field(
        None, description="Memory and speed settings for a GPU of this memory; what stands beside it goes before it."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the run computes.")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: leave as they are.")
    gradient_checkpointing: bool = Field(False, description="Trade time for memory in the denoiser.")
    compile: Compile = Field(
        "no", description="Compile the denoiser: full, or its repeated blocks only, which takes a fraction of the time."
    )
    offload: list[Literal["text_encoders", "reward"]] = Field(
        default_factory=list,
        description="What waits in the host's memory while it is idle: text_encoders (image encoders too), reward "
        "(monitored ones too).",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Dtype of torch.autocast around the pipeline, in rollout and training alike."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, value: Any) -> Any:
        return with_preset(value) if isinstance(value, Mapping) else value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _resolve_algorithm(cls, value: Any) -> dict[str, Any]:
        return checked_algorithm(value)

    @field_validator("reward", mode="before")
    @classmethod
    def _resolve_reward(cls, value: Any) -> Any:
        return checked_reward(value)

    @field_validator("monitor", mode="after")
    @classmethod
    def _resolve_monitor(cls, value: MonitorConfig | None) -> MonitorConfig | None:
        if value is None:
            return None
        return value.model_copy(update={"rewards": checked_reward(value.rewards, "monitor.rewards")})

    @field_validator("prompts", mode="after")
    @classmethod
    def _resolve_prompts(cls, value: PromptsConfig) -> PromptsConfig:
        try:
            load_split(value)
        except UserError as error:
            raise Problems([located("prompts", str(error))]) from None
        return value

    @field_validator("model", mode="after")
    @classmethod
    def _resolve_model(cls, value: ModelConfig) -> ModelConfig:
        known = [name for name, model in MODELS.items() if model.kind == "pipeline"]
        if value.id.startswith("difftune/") and value.id not in known:
            raise Problems(
                [f"model.id: unknown model {value.id!r}{nearest(value.id, known)} (embedded: {', '.join(known)})"]
            )
        if value.id.startswith((".", "/", "~")) and not Path(value.id).expanduser().is_dir():
            raise Problems([f"model.id: got {value.id!r}, which is not a folder; expected a folder or a hub id"])
        return value
