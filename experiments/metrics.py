"""The metrics that several result files share: one pure function each. docs/metrics.md has formulas and units.

Their argument is the result of `frame`: one row per response, with the single-valued fields of `core.records.Response`
as columns. An unknown metric (no response, no token) is NaN, an empty cell in the CSV.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.records import Choice, FinishReason, Response
from experiments.records import RunRecords

PARTS = ("transit", "wait", "prefill", "decode", "leaving")
"""The parts of a request's latency, in order: see `parts_ms`."""


def frame(responses: Sequence[Response]) -> pd.DataFrame:
    """One row per response, in the order of completion. The columns exist even without rows.

    `decode_steps`: those that `tpot_ms` is the mean of.
    """
    left_out = {"token_ids", "logprobs", "prompt_logprobs", "further_choices", "sampling"}
    columns = [*(name for name in Response.model_fields if name not in left_out), "decode_steps"]
    rows = [
        response.model_dump(mode="json", exclude=left_out) | {"decode_steps": _decode_steps(response)}
        for response in responses
    ]
    return pd.DataFrame(rows, columns=columns).sort_values("completed_at_ms", ignore_index=True)


def mean(answers: pd.DataFrame, column: str) -> float:
    """Arithmetic mean of the known values."""
    values = _values(answers, column)
    return float(values.mean()) if values.size else math.nan


def percentile(answers: pd.DataFrame, column: str, percent: float) -> float:
    """Percentile of the known values, by linear interpolation between the closest ranks."""
    values = _values(answers, column)
    return float(np.percentile(values, percent)) if values.size else math.nan


def span_s(answers: pd.DataFrame) -> float:
    """Time from the creation of the first request until the last answer leaves its slot."""
    if answers.empty:
        return math.nan
    return float(answers["completed_at_ms"].max() - answers["created_at_ms"].min()) / 1000


def throughput_req_per_s(answers: pd.DataFrame) -> float:
    return ratio(len(answers), span_s(answers))


def output_tokens_per_s(answers: pd.DataFrame) -> float:
    return ratio(float(answers["output_tokens"].sum()), span_s(answers))


def departure_rate(answers: pd.DataFrame) -> float:
    """Answers per second between the first and the last answer: (|R| - 1) / (last - first completion).

    It does not depend on the latency of one answer. Under overload it is the system's capacity.
    """
    if answers.empty:
        return math.nan
    lasted_ms = float(answers["completed_at_ms"].max() - answers["completed_at_ms"].min())
    return ratio(1000.0 * (len(answers) - 1), lasted_ms)


def keeps_up(run: RunRecords, answers: pd.DataFrame, share: float = 0.9) -> bool:
    """True if answers left at `share` of the offered rate or more. A backlog has no offered rate, so it keeps up."""
    offered = run.manifest.load.offered_rate
    return offered is None or not departure_rate(answers) < share * offered


def parts_ms(answers: pd.DataFrame) -> pd.DataFrame:
    """Parts of each request's latency: one row per response, with the columns `PARTS`, which add up to `e2e_ms`.

    transit: from creation to arrival at the operator; wait: to the begin of its prefill; prefill: to the first token;
    decode: to the last token of its choices; leaving: until the answer leaves with its micro-batch. If an answer has
    no token, all its time after the wait is prefill.
    """
    decode = (answers["tpot_ms"].astype(float) * answers["decode_steps"]).fillna(0.0)
    to_prefill = answers["inference_ms"] - decode
    first_token = answers["ttft_ms"].astype(float).fillna(answers["e2e_ms"])
    begin = first_token - to_prefill
    return pd.DataFrame(
        {
            "transit": begin - answers["wait_ms"],
            "wait": answers["wait_ms"],
            "prefill": to_prefill,
            "decode": decode,
            "leaving": answers["e2e_ms"] - first_token - decode,
        },
        columns=list(PARTS),
        dtype=float,
    )


def began_at_ms(answers: pd.DataFrame) -> "pd.Series[float]":
    """Unix time of the begin of each request's prefill, when it did its lookup and read capacity and use."""
    parts = parts_ms(answers)
    moments: pd.Series[float] = answers["created_at_ms"] + parts["transit"] + parts["wait"]
    return moments


def busy_share_percent(answers: pd.DataFrame, slots: int) -> float:
    """Share of the span during which a slot had a request between begin of prefill and leaving; mean of all `slots`."""
    busy = answers.assign(begin_ms=began_at_ms(answers))
    covered_ms = sum(_covered_ms(rows) for _, rows in busy.groupby("slot"))
    return ratio(100.0 * covered_ms, slots * 1000.0 * span_s(answers))


def batches(answers: pd.DataFrame) -> "pd.Series[int]":
    """Sizes of the micro-batches, each once. Continuous: for each request, the number running when it began."""
    sizes: pd.Series[int] = answers.drop_duplicates("batch_id")["batch_size"]
    return sizes


def avg_batch_size(answers: pd.DataFrame) -> float:
    """Mean size of the micro-batches, each counted once."""
    sizes = batches(answers)
    return ratio(float(sizes.sum()), len(sizes))


def named(answers: pd.DataFrame, column: str) -> str:
    """The distinct values of a text column, joined by `+`."""
    return "+".join(sorted(answers[column].astype(str).unique()))


def threads_per_slot(run: RunRecords) -> int | None:
    """CPU threads that the slots reported when they were ready; none if they reported none, or differ."""
    said = {slot.threads for slot in run.manifest.slots}
    return said.pop() if len(said) == 1 else None


def shared(run: RunRecords, answers: pd.DataFrame) -> dict[str, Any]:
    """Values of the columns that mean the same in every result file."""
    manifest = run.manifest
    return {
        "total_requests": len(answers),
        "dead_letters": len(run.dead_letters),
        "duplicates": manifest.duplicates,
        "avg_latency_ms": mean(answers, "e2e_ms"),
        "p50_latency_ms": percentile(answers, "e2e_ms", 50),
        "p95_latency_ms": percentile(answers, "e2e_ms", 95),
        "p99_latency_ms": percentile(answers, "e2e_ms", 99),
        "avg_ttft_ms": mean(answers, "ttft_ms"),
        "p50_ttft_ms": percentile(answers, "ttft_ms", 50),
        "p95_ttft_ms": percentile(answers, "ttft_ms", 95),
        "avg_tpot_ms": mean(answers, "tpot_ms"),
        "avg_wait_ms": mean(answers, "wait_ms"),
        "avg_inference_ms": mean(answers, "inference_ms"),
        "output_tokens_per_s": output_tokens_per_s(answers),
        "avg_batch_size": avg_batch_size(answers),
        "avg_decode_rows": mean(answers, "decode_rows"),
        "parallelism": manifest.job.parallelism,
        "threads_per_slot": threads_per_slot(run),
        "device": named(answers, "device"),
        "engine": named(answers, "engine"),
        "model": named(answers, "model"),
        "workload": str(manifest.workload.workload),
        "seed": manifest.workload.seed,
        "offered_rate": manifest.load.offered_rate,
        "reached_rate": manifest.load.reached_rate,
    }


def ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _covered_ms(slot: pd.DataFrame) -> float:
    """Length of the union of the intervals from `begin_ms` to `completed_at_ms`."""
    ordered = slot.sort_values("begin_ms")
    begins, ends = ordered["begin_ms"].to_numpy(dtype=float), ordered["completed_at_ms"].to_numpy(dtype=float)
    # For each interval, the latest end of the intervals that began earlier.
    reached = np.concatenate(([-np.inf], np.maximum.accumulate(ends)[:-1]))
    return float(np.maximum(ends - np.maximum(begins, reached), 0.0).sum())


def _decode_steps(response: Response) -> int:
    """Steps after the first token, of the choice that has most."""
    # The step that gave an end-of-sequence token added no token to the answer.
    choices: tuple[Response | Choice, ...] = (response, *response.further_choices)
    steps = (len(one.token_ids) - 1 + (one.finish_reason is FinishReason.STOP) for one in choices)
    return max(0, *steps)


def _values(answers: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    return answers[column].dropna().to_numpy(dtype=float)
