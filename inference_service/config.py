"""Options of the engine: the model, its device, and the limits of a running batch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from core.config import Config
from inference_service.registry import ENGINES

DTYPES = ("float32", "bfloat16", "float16")


class SamplingDefaults(StrEnum):
    """Where sampling parameters come from that a request does not set."""

    MODEL = "model"
    """From the model's `generation_config.json`."""
    NEUTRAL = "neutral"
    """Greedy: the most likely token, without penalties, filters or rules."""


class EngineConfig(Config):
    """The model, its device, and the limits of a running batch."""

    engine: Annotated[str, ENGINES] = Field(
        default="transformers",
        description="engine that runs the model; simulated only waits for as long as a device would compute",
    )
    profile: Path | None = Field(
        default=None, description="simulated: path of a JSON file with the measured times of the device"
    )
    model: str = Field(
        default="default",
        min_length=1,
        description="path or hub name of a causal language model; default: a small model that is built here",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="cpu, cuda, cuda:N, or auto: one GPU per slot if the host has GPUs, else cpu",
    )
    dtype: str = Field(
        default="auto",
        pattern=f"^({'|'.join(('auto', *DTYPES))})$",
        description="data type of weights, keys and values; auto: the checkpoint's on a GPU, float32 on a CPU",
    )
    sampling_defaults: SamplingDefaults = Field(
        default=SamplingDefaults.MODEL,
        description="sampling parameters that a request does not set: model takes them from its "
        "generation_config.json, neutral is greedy",
    )
    max_running: int = Field(default=8, ge=1, le=1024, description="maximum number of sequences that decode together")
    max_model_len: int = Field(
        default=2048, ge=2, description="maximum tokens of a sequence, prompt and answer together"
    )
    max_running_tokens: int = Field(
        default=0,
        ge=0,
        description="maximum tokens of all running sequences, prompts and answers together; 0: max_running * "
        "max_model_len",
    )
    step_prefill_tokens: int = Field(
        default=256,
        ge=0,
        description="continuous: maximum prompt tokens to prefill between two decode steps; 0: no limit",
    )
    step_prefill_ms: float = Field(
        default=50.0,
        ge=0,
        description="continuous: longest time that prefilling part of a prompt longer than step_prefill_tokens may "
        "delay running sequences; 0: no limit",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads per slot; 0: usable cores / parallelism")
    allow_special_tokens: bool = Field(
        default=False,
        description="read the names of special tokens in a request's text as these tokens, not as plain text",
    )
    request_timeout_ms: float = Field(
        default=600_000.0,
        ge=0,
        description="a request that has no answer this long after it was decoded becomes a dead letter; 0: never",
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
