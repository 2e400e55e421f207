"""The report that every benchmark writes: conditions, samples, and figures computed from them."""

import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field, field_validator
from redis import Redis

from core.clients import redis_settings
from core.config import Config
from experiments.config import ROOT
from experiments.provenance import provenance
from inference_service.model import LoadedModel

RESAMPLES = 2000
VERSIONS = ("python", "apache-flink", "torch", "transformers", "redis")


class Report(Config):
    """One benchmark's result. `samples` are the authority; all `figures` follow from them."""

    benchmark: str
    command: str
    started_at: str
    machine: dict[str, Any]
    versions: dict[str, str | bool | None]
    model: dict[str, Any]
    rounds: int = Field(ge=1)
    settings: dict[str, Any]
    figures: dict[str, float]
    samples: dict[str, list[float]]
    """Each series is in the order of the rounds. Values at the same position of two series were measured together."""

    @field_validator("figures")
    @classmethod
    def _finite(cls, figures: dict[str, float]) -> dict[str, float]:
        if broken := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise ValueError(f"not finite: {', '.join(broken)}")
        return figures

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")


def conditions(model: LoadedModel, redis_url: str | None) -> dict[str, Any]:
    """Fields of a `Report` about machine, versions and model. Call it after threads are set."""
    return conditions_of(device_facts(model), model_facts(model), redis_url)


def conditions_of(device: dict[str, Any], model: dict[str, Any], redis_url: str | None) -> dict[str, Any]:
    """`conditions` for a model in another process, which reports its device and model."""
    here = provenance()
    versions: dict[str, str | bool | None] = {name: here.versions[name] for name in VERSIONS if name != "redis"}
    versions["redis-py"] = here.versions["redis"]
    if redis_url is not None:
        with Redis.from_url(redis_url, **redis_settings(redis_url)) as client:
            versions["redis-server"] = str(client.info("server")["redis_version"])
    return {
        "command": shlex.join(["python", *map(_without_folder, sys.orig_argv[1:])]),
        "started_at": here.started_at,
        "machine": here.machine | device,
        "versions": versions | {"git_commit": here.git_commit, "git_dirty": here.git_dirty},
        "model": model,
    }


def _without_folder(argument: str) -> str:
    """Replace a path by the file's name: its folder means nothing on another machine."""
    path = Path(argument)
    return argument if path.resolve().is_relative_to(ROOT) or not path.is_file() else path.name


def device_facts(model: LoadedModel) -> dict[str, Any]:
    """Device and threads of a loaded model in this process."""
    device: dict[str, Any] = {"threads": torch.get_num_threads(), "device": str(model.device)}
    if model.device.type == "cuda":
        device["gpu"] = torch.cuda.get_device_name(model.device)
    return device


def model_facts(model: LoadedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


class Neighbours:
    """Measures how busy other processes keep the cores. More than a few percent distorts every measured time.

    `ours_s` returns the CPU time so far of further processes that belong to the measurement.
    """

    def __init__(self, redis_url: str | None = None, ours_s: Callable[[], float] = lambda: 0.0) -> None:
        self._redis_url = redis_url
        self._ours_s = ours_s
        self._began_s = time.monotonic()
        self._at_begin_s = self._others_s()

    def busy_percent(self) -> float:
        """Percent of all cores' time since the start that others than this process, Redis and `ours_s` used."""
        elapsed_s = (time.monotonic() - self._began_s) * (psutil.cpu_count() or 1)
        return max(0.0, 100 * (self._others_s() - self._at_begin_s) / elapsed_s)

    def _others_s(self) -> float:
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        ours_s = own.user + own.system + self._ours_s() + self._redis_s()
        return machine.user + machine.nice + machine.system + machine.steal - ours_s

    def _redis_s(self) -> float:
        if self._redis_url is None:
            return 0.0
        with Redis.from_url(self._redis_url, **redis_settings(self._redis_url)) as client:
            redis = client.info("cpu")
        return float(redis["used_cpu_user"]) + float(redis["used_cpu_sys"])


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each pair, which cancels out slow times of the whole machine."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the median as `name`, and the quartiles as `name_p25` and `name_p75`."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {name: statistics.median(values), f"{name}_p25": low, f"{name}_p75": high}


def median_noise(values: Sequence[float]) -> float:
    """Half the width of the 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = [statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    cuts = statistics.quantiles(medians, n=40)
    return (cuts[-1] - cuts[0]) / 2
