"""The result file of the scaling experiment: its columns and its own metrics."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.metrics import busy_share_percent, frame, ratio, shared, span_s, throughput_req_per_s
from experiments.records import RunRecords
from experiments.report import Shown

SEED_COLUMNS = ("parallelism", "total_throughput", "scale_factor", "gpu_distribution", "execution_time")
OWN_COLUMNS = (
    "efficiency", "utilisation_percent", "total_requests", "dead_letters", "duplicates", "output_tokens_per_s",
    "avg_latency_ms", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms", "avg_ttft_ms", "avg_tpot_ms",
    "avg_decode_rows", "devices", "min_device_requests", "max_device_requests", "threads_per_slot", "cores",
    "device", "engine", "model", "workload", "seed",
)  # fmt: skip
COLUMNS = SEED_COLUMNS + OWN_COLUMNS

SHOWN: tuple[Shown, ...] = (
    ("slots", "parallelism", ",.0f"),
    ("requests", "total_requests", ",.0f"),
    ("dead", "dead_letters", ",.0f"),
    ("req/s", "total_throughput", ".2f"),
    ("tokens/s", "output_tokens_per_s", ",.0f"),
    ("scale", "scale_factor", ".2f"),
    ("efficiency", "efficiency", ".2f"),
    ("busy %", "utilisation_percent", ".0f"),
    ("time s", "execution_time", ".1f"),
    ("p50 ms", "p50_latency_ms", ",.0f"),
    ("p95", "p95_latency_ms", ",.0f"),
    ("engine", "engine", ""),
    ("requests of each device", "gpu_distribution", ""),
)


def requests_per_device(run: RunRecords) -> dict[str, int]:
    """Number of answers of each device, in the order of device numbers; 0 for a device without a request.

    `GPU<index>` may serve several slots. On a CPU (`CPU<slot>`) and if simulated (`SIM<slot>`), each slot is a device.
    """
    answers = Counter(answer.slot for answer in run.responses)
    counts: dict[tuple[str, int], int] = {}
    for slot in run.manifest.slots:
        device = _device(slot.device, slot.slot)
        counts[device] = counts.get(device, 0) + answers[slot.slot]
    return {f"{kind}{number}": count for (kind, number), count in sorted(counts.items())}


def gpu_distribution(run: RunRecords) -> str:
    """Number of answers of each device, as `GPU0:25;GPU1:25`."""
    return ";".join(f"{device}:{count}" for device, count in requests_per_device(run).items())


def row(run: RunRecords, baseline: RunRecords) -> dict[str, Any]:
    """One run's row of the CSV, compared with `baseline`, in the order of `COLUMNS`."""
    answers = frame(run.responses)
    slots = run.manifest.job.parallelism
    throughput = throughput_req_per_s(answers)
    scale_factor = ratio(throughput, throughput_req_per_s(frame(baseline.responses)))
    devices = requests_per_device(run)
    values = shared(run, answers) | {
        "total_throughput": throughput,
        "scale_factor": scale_factor,
        "gpu_distribution": gpu_distribution(run),
        "execution_time": span_s(answers),
        "efficiency": scale_factor * baseline.manifest.job.parallelism / slots,
        "utilisation_percent": busy_share_percent(answers, slots),
        "devices": len(devices),
        "min_device_requests": min(devices.values()),
        "max_device_requests": max(devices.values()),
        "cores": cores(run),
    }
    return {name: values[name] for name in COLUMNS}


def table(runs: Sequence[RunRecords]) -> pd.DataFrame:
    """One row per run, in the order of `COLUMNS`, compared with the row of the smallest parallelism."""
    baseline = min(runs, key=lambda run: run.manifest.job.parallelism)
    return pd.DataFrame([row(run, baseline) for run in runs], columns=list(COLUMNS))


def cores(run: RunRecords) -> int | None:
    """Cores of the machine that submitted the job. With the local stack, the slots run on it too."""
    found = run.manifest.provenance.machine.get("cores")
    return None if found is None else int(found)


def notes(runs: Sequence[RunRecords]) -> list[str]:
    """A sentence for each run whose slots do not each have their own device."""
    said = []
    for run in runs:
        slots, devices = run.manifest.job.parallelism, requests_per_device(run)
        if len(devices) < slots:
            said.append(f"{run.manifest.variant}: {slots} slots share {len(devices)} GPU; it is slots that scale.")
    if any(slot.device == "cpu" for run in runs for slot in run.manifest.slots):
        threads = sorted({slot.threads for run in runs for slot in run.manifest.slots if slot.threads is not None})
        each = "/".join(map(str, threads)) or "an unknown number of"
        said.append(
            f"The slots share one machine's {cores(runs[0])} cores with Kafka and Flink (threads of a slot: {each}): "
            "it is cores that scale, not devices."
        )
    return said


def _device(name: str, slot: int) -> tuple[str, int]:
    kind, _, index = name.partition(":")
    return ("GPU", int(index or 0)) if kind == "cuda" else ("SIM" if kind == "simulated" else kind.upper(), slot)
