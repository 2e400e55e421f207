"""Raw records of a run, the authority for every number: requests, outcomes and conditions.

`<folder>/<variant>.jsonl` has one object per line: `{"sent": ...}`, `{"response": ...}` or `{"dead_letter": ...}`.
`<folder>/<variant>.manifest.json` has the conditions. It is written last: a run without a manifest is not complete.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from core.config import Config
from core.errors import UserError, one_line
from core.records import DeadLetter, Response
from operators.config import JobConfig
from workloads.config import WorkloadConfig
from workloads.kafka_generator import LoadReport

MANIFEST = ".manifest.json"


class Sent(Config):
    """One sent request: its id, its session and its due time (Unix)."""

    request_id: str
    session_id: str
    created_at_ms: float


class ReadySlot(Config, extra="allow"):
    """The record that a slot writes when its model is loaded and warm. Other fields are kept as they are."""

    slot: int
    device: str
    model: str
    engine: str
    dtype: str | None = None
    """Data type of weights, keys and values; none if the record does not say."""
    threads: int | None = None
    """CPU threads of the slot; none if the record does not say."""


class LoadSummary(Config):
    """The offered and reached load. Rates are in requests per second, and none if they are not defined."""

    sent: int
    acknowledged: int
    errors: int
    first_error: str | None
    duration_ms: float
    offered_rate: float | None
    reached_rate: float | None
    lag_mean_ms: float
    lag_max_ms: float
    lag_late: int
    adjustments: dict[str, int]

    @classmethod
    def of(cls, report: LoadReport) -> "LoadSummary":
        return cls(
            sent=report.sent,
            acknowledged=report.acknowledged,
            errors=report.errors,
            first_error=report.first_error,
            duration_ms=report.duration_ms,
            offered_rate=report.offered_rate,
            reached_rate=report.reached_rate,
            lag_mean_ms=report.lag.mean_ms,
            lag_max_ms=report.lag.max_ms,
            lag_late=report.lag.late,
            adjustments=dict(report.adjustments),
        )


class Provenance(Config):
    """Time, machine, versions and commit of a run."""

    started_at: str
    machine: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    git_dirty: bool | None


class Manifest(Config):
    """Everything about one run except its records."""

    experiment: str
    run_id: str
    variant: str
    position: int
    """Place among the run's variants, from 0."""
    job: JobConfig
    workload: WorkloadConfig
    job_id: str
    slots: tuple[ReadySlot, ...]
    load: LoadSummary
    duplicates: int
    """Number of answers to requests that already had one."""
    late_duplicates: int
    """Number of `duplicates` that came after the last request had its first answer."""
    failures: tuple[str, ...]
    """Causes of restarts of the job during the run. If there are any, the run measured recovery too."""
    provenance: Provenance

    @property
    def simulated(self) -> bool:
        """True if the times are those of a device profile, and nothing was computed."""
        return self.job.engine.is_simulated


KINDS: dict[str, type[BaseModel]] = {"sent": Sent, "response": Response, "dead_letter": DeadLetter}
"""Kinds of lines, in the order of the fields of `RunRecords`."""


@dataclass(frozen=True)
class RunRecords:
    """One run: a variant's manifest and records. All metrics are functions of this only."""

    manifest: Manifest
    sent: tuple[Sent, ...]
    responses: tuple[Response, ...]
    dead_letters: tuple[DeadLetter, ...]


def write_run(folder: Path, run: RunRecords) -> Path:
    """Write the run's two files below `folder`; return the path of the records."""
    folder.mkdir(parents=True, exist_ok=True)
    name = run.manifest.variant.lower()
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for kind, records in zip(KINDS, (run.sent, run.responses, run.dead_letters), strict=True):
            for record in records:
                # The reader validates the model's own dump.
                lines.write(json.dumps({kind: record.model_dump(mode="json")}) + "\n")
    fresh = folder / f"{name}{MANIFEST}.new"
    fresh.write_text(run.manifest.model_dump_json(indent=1) + "\n")
    fresh.replace(folder / f"{name}{MANIFEST}")
    return path


def read_runs(folder: Path) -> list[RunRecords]:
    """Return all complete runs of `folder` in order. Raises `UserError` that names the bad file and line."""
    if not folder.is_dir():
        raise UserError(f"--from-raw: {folder} is not a folder; give the raw/RUN folder of an earlier run")
    runs = [_read_run(path) for path in sorted(folder.glob(f"*{MANIFEST}"))]
    if not runs:
        raise UserError(f"--from-raw: {folder} holds no *{MANIFEST}; give the raw/RUN folder of a finished run")
    return sorted(runs, key=lambda run: run.manifest.position)


def _read_run(manifest_path: Path) -> RunRecords:
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{manifest_path}: {one_line(error)}") from None
    path = manifest_path.with_name(manifest_path.name.removesuffix(MANIFEST) + ".jsonl")
    records: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                kind, record = _read_line(path, number, line)
                records[kind].append(record)
    except FileNotFoundError:
        raise UserError(f"{path} is missing beside its manifest; restore it, or delete the manifest") from None
    return RunRecords(manifest, *(tuple(records[kind]) for kind in KINDS))


def _read_line(path: Path, number: int, line: str) -> tuple[str, BaseModel]:
    try:
        ((kind, value),) = json.loads(line).items()
        if kind not in KINDS:
            raise UserError(f"{path}, line {number}: {kind!r} is not a kind of record; remove the line")
        return kind, KINDS[kind].model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}, line {number}: {one_line(error)}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}, line {number}: not one JSON object of one kind; remove the line") from None
