"""Options of the engine: the model, its device, and the limits of a running batch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from core.config import Config
from inference_service.registry import ENGINES

DTYPES = ("float32", "bfloat16", "float16")


class SamplingDefaults(StrEnum):
    """How tokens are chosen where a request does not say."""

    MODEL = "model"
    """As the model's `generation_config.json` says."""
    NEUTRAL = "neutral"
    """The most likely token, without penalties, filters or rules."""


class EngineConfig(Config):
    """The model and the pool of slots it runs on."""

    engine: Annotated[str, ENGINES] = Field(
        default="transformers", description="transformers, or simulated: waits for as long as a device would compute"
    )
    profile: Path | None = Field(default=None, description="simulated: JSON file of the device's times")
    model: str = Field(default="default", min_length=1, description="path or name of a causal LM; default: built here")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: one GPU a slot if there are, else cpu"
    )
    dtype: str = Field(
        default="auto",
        pattern=f"^({'|'.join(('auto', *DTYPES))})$",
        description="of weights and key/value; auto: the checkpoint's on a GPU, float32 on a CPU",
    )
    sampling_defaults: SamplingDefaults = Field(
        default=SamplingDefaults.MODEL,
        description="where a request does not say: model, as its generation_config.json; neutral, the likeliest token",
    )
    max_running: int = Field(default=8, ge=1, le=1024, description="sequences that decode together")
    max_model_len: int = Field(default=2048, ge=2, description="longest sequence, prompt and answer, in tokens")
    max_running_tokens: int = Field(
        default=0, ge=0, description="prompt and answer tokens of all that runs; 0: max_running * max_model_len"
    )
    step_prefill_tokens: int = Field(
        default=256, ge=0, description="continuous: prompt tokens prefilled between two decode steps; 0: no limit"
    )
    step_prefill_ms: float = Field(
        default=50.0,
        ge=0,
        description="continuous: longest that a prompt above step_prefill_tokens holds running ones; 0: no limit",
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="CPU threads of one slot; 0: cores that it may use / parallelism"
    )
    allow_special_tokens: bool = Field(
        default=False,
        description="special tokens that the text of a request spells are those tokens; else they are text",
    )
    request_timeout_ms: float = Field(
        default=600_000.0,
        ge=0,
        description="a request that is not answered this long after it was decoded becomes a dead letter; 0: never",
    )

    @property
    def is_simulated(self) -> bool:
        """True if the engine waits for as long as a device would compute, and computes nothing."""
        return self.engine == "simulated"

    @model_validator(mode="after")
    def _profile_where_simulated(self) -> Self:
        if self.is_simulated and self.profile is None:
            raise ValueError("profile is missing; name the file that benchmarks/engine.py wrote")
        if not self.is_simulated and self.profile is not None:
            raise ValueError("profile is only read where engine is simulated; leave it out, or add that")
        return self
