"""What a slot does, for those who watch it: one definition of each figure, for Prometheus and for Flink's own metrics.

Counts of requests are made in Flink's worker, as their answers leave; those of the engine and the cache come with each
sign of life of the slot's process. They begin anew with every process there, and go on here.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from core.clock import Clock, SystemClock
from core.records import DeadLetter, FinishReason
from operators.envelope import QueueState, SlotStats, WrittenResponse
from operators.metrics.sliding_window import PERCENTS, SlidingWindow
from operators.metrics.tally import CountTally, TimeTally

PREFIX = "infertuner"
LONG_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
IN_FLINK = ("slot_up", "in_flight_requests", "waiting_requests", "e2e_p95_seconds")
"""The gauges that Flink shows too. PyFlink sends each with every bundle, which costs 40 us of the worker's time. All
gauges together took as long as a bundle of ten records."""
_ENGINE_FAILED = ("cache failed", "prefill failed", "decode failed", "answer failed")
"""How the reason of a dead letter begins if a step of the engine failed."""


@dataclass(frozen=True)
class Latency:
    """A duration of each answered request, shown as a histogram, and as percentiles of the latest requests."""

    name: str
    help: str
    buckets_s: tuple[float, ...]
    read_ms: Callable[[WrittenResponse], float | None]


LATENCIES = (
    Latency("e2e", "From the creation of a request until its answer leaves", LONG_S, lambda r: r.e2e_ms),
    Latency("ttft", "From the creation of a request until its first token", LONG_S, lambda r: r.ttft_ms),
    Latency("tpot", "Mean time of a request's tokens after the first", TOKEN_S, lambda r: r.tpot_ms),
    Latency("wait", "From the decoding of a request until the engine begins with it", SHORT_S, lambda r: r.wait_ms),
)


@dataclass(frozen=True)
class ProcessCounter:
    """A counter of the slot's process."""

    name: str
    help: str
    read: Callable[[SlotStats], float]
    labels: tuple[tuple[str, str], ...] = ()


def _of_cache(field: str) -> Callable[[SlotStats], float]:
    return lambda stats: 0 if stats.cache is None else getattr(stats.cache, field)


def _of_engine(field: str) -> Callable[[SlotStats], float]:
    return lambda stats: getattr(stats.engine, field)


_ENGINE_TOKENS = "Tokens that the engine processed, including those of unanswered requests"
_ERRORS = "Passes that failed, and requests whose chunks could not be kept"
_HITS = "Chunks that a lookup found"
_FAULTS = "Failed lookups and writes in Redis: errors, time-outs, damaged records"
PROCESS_COUNTERS = (
    *(
        ProcessCounter("engine_tokens", _ENGINE_TOKENS, _of_engine(f"{kind}_tokens"), (("kind", kind),))
        for kind in ("prefilled", "decoded", "local", "remote")
    ),
    ProcessCounter("passes", "Forward passes", _of_engine("passes")),
    ProcessCounter("decode_passes", "Forward passes in which sequences decoded", _of_engine("decode_passes")),
    ProcessCounter("errors", _ERRORS, _of_engine("failed_passes"), (("kind", "pass"),)),
    ProcessCounter("errors", _ERRORS, _of_engine("failed_stores"), (("kind", "store"),)),
    ProcessCounter(
        "cache_looked_up_chunks", "Full chunks of the prompts that were looked up", _of_cache("chunks_looked_up")
    ),
    ProcessCounter("cache_hit_chunks", _HITS, _of_cache("local_chunks_hit"), (("tier", "local"),)),
    ProcessCounter("cache_hit_chunks", _HITS, _of_cache("remote_chunks_hit"), (("tier", "remote"),)),
    ProcessCounter("cache_stored_chunks", "Chunks that were kept", _of_cache("chunks_stored")),
    ProcessCounter("cache_refused_chunks", "Chunks that the local tier did not take", _of_cache("chunks_refused")),
    ProcessCounter("cache_evicted_chunks", "Chunks that left the local tier", _of_cache("evictions")),
    *(
        ProcessCounter("cache_remote_faults", _FAULTS, _of_cache(f"remote_{kind}"), (("kind", kind),))
        for kind in ("errors", "timeouts", "corrupt")
    ),
    ProcessCounter("cache_write_dropped_chunks", "Chunks that were not written to Redis", _of_cache("write_dropped")),
    ProcessCounter("cache_read_bytes", "Records that came from Redis", _of_cache("bytes_read")),
    ProcessCounter("cache_written_bytes", "Records that Redis took", _of_cache("bytes_written")),
)


class SlotMetrics:
    """The metrics of one slot, in a registry of Prometheus of their own. Any thread may call and read.

    `duplicates`, `retries` and `restarts` are counters; the caller increments them.
    """

    def __init__(self, slot: int, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self._slot = str(slot)
        self._clock = clock
        self._stats: SlotStats | None = None
        self._serves = False
        self._updated_ms = clock.monotonic_ms()
        self._decode_rows = 0.0
        self.queue: Callable[[], QueueState] = QueueState
        self.waiting_since_ms: Callable[[], float | None] = lambda: None
        """Time at which the oldest waiting request was decoded. The supervisor sets both."""

        self._requests = self._tally("requests", "Answered requests", "finish_reason", FinishReason)
        self._letters = self._counter("dead_letters", "Requests that became dead letters", "stage", "cause")
        self._prompt_tokens = self._tally(
            "prompt_tokens", "Prompt tokens of answered requests", "source", ("local", "remote", "computed")
        )
        self._output_tokens = self._tally("output_tokens", "Tokens of answers")
        self.restarts = self._counter("slot_restarts", "Restarts of the slot's process").labels(self._slot)
        self.retries = self._counter(
            "retried_requests", "Requests that were retried after the process died with them"
        ).labels(self._slot)
        self.duplicates = self._counter(
            "skipped_duplicates", "Requests that had been answered before and were skipped"
        ).labels(self._slot)
        self._process_counters = self._made_process_counters()
        self._times = [self._histogram(latency) for latency in LATENCIES]
        self._windows = [SlidingWindow(clock) for _ in LATENCIES]
        for name, text, read in self._gauges():
            gauge = Gauge(name, text, ["slot"], namespace=PREFIX, registry=self.registry)
            gauge.labels(self._slot).set_function(read)

    def flink_gauges(self) -> dict[str, Callable[[], int]]:
        """The gauges of `IN_FLINK` as integers, which Flink requires: seconds as milliseconds, 0 for unknown values."""
        found: dict[str, Callable[[], int]] = {}
        for name, _, read in self._gauges():
            if name not in IN_FLINK:
                continue
            seconds = name.endswith("_seconds")
            whole = f"{PREFIX}_{name.removesuffix('_seconds')}_milliseconds" if seconds else f"{PREFIX}_{name}"
            found[whole] = partial(_whole, read, 1000 if seconds else 1)
        return found

    def answered(self, record: WrittenResponse | DeadLetter) -> None:
        """Count an answer or a dead letter that leaves. Only one thread at a time may pass answers."""
        if isinstance(record, DeadLetter):
            self._letters.labels(self._slot, record.stage, cause_of(record)).inc()
            return
        self._requests[record.finish_reason] += 1
        self._prompt_tokens["local"] += record.local_tokens
        self._prompt_tokens["remote"] += record.remote_tokens
        self._prompt_tokens["computed"] += record.computed_tokens
        self._output_tokens[""] += record.output_tokens
        now_ms = self._clock.monotonic_ms()
        for latency, times, window in zip(LATENCIES, self._times, self._windows, strict=True):
            if (took_ms := latency.read_ms(record)) is not None:
                # Negative if the client's clock is ahead. Prometheus would take a falling sum for a restart.
                took_s = max(0.0, took_ms) / 1e3
                times.add(took_s)
                window.add(took_s, now_ms)

    def set_ready(self, serves: bool) -> None:
        """A process is ready, or is not any more. The counters of a new process begin at 0."""
        self._serves = serves
        self._updated_ms = self._clock.monotonic_ms()
        if not serves:
            self._stats = None
            self._decode_rows = 0.0

    def update(self, stats: SlotStats) -> None:
        """Take over the statistics of a heartbeat."""
        before, self._stats = self._stats, stats
        for one, counter in zip(PROCESS_COUNTERS, self._process_counters, strict=True):
            counter.inc(one.read(stats) - (0 if before is None else one.read(before)))
        self._updated_ms = self._clock.monotonic_ms()
        passes, tokens = stats.engine.decode_passes, stats.engine.decoded_tokens
        if before is not None:
            passes, tokens = passes - before.engine.decode_passes, tokens - before.engine.decoded_tokens
        self._decode_rows = tokens / passes if passes else 0.0

    def _gauges(self) -> Iterator[tuple[str, str, Callable[[], float]]]:
        """Name, text and value of each gauge."""
        yield "slot_up", "1 while the slot's process is ready, 0 while it loads or is replaced", lambda: self._serves
        yield "slot_silence_seconds", "Time since the last heartbeat of the slot's process", self._silence_s
        yield "slot_resident_bytes", "Memory of the slot's process", self._now(lambda stats: stats.resident_bytes)
        yield "in_flight_requests", "Requests that the slot has not answered", lambda: self.queue().in_flight
        yield "waiting_requests", "In-flight requests that have not begun", lambda: self.queue().waiting
        yield "oldest_wait_seconds", "Time since the oldest waiting request was decoded", self._oldest_wait_s
        for field, text in (
            ("prefilling", "Requests whose prompt is partly computed"),
            ("running", "Requests that decode"),
        ):
            yield f"{field}_requests", text, self._now(_of_engine(field))
        yield (
            "decode_rows",
            "Mean number of requests that decoded together since the last heartbeat",
            lambda: self._decode_rows,
        )
        for name, field, text in (
            ("cache_capacity_chunks", "capacity_chunks", "Capacity of the local tier"),
            ("cache_used_chunks", "used_chunks", "Chunks in the local tier"),
            ("cache_local_bytes", "local_bytes", "Tensors in the local tier"),
            ("cache_fetched_bytes", "fetched_bytes", "Tensors from Redis that wait for their request to begin"),
            ("cache_write_queue_bytes", "queued_bytes", "Tensors that wait to be written to Redis"),
        ):
            yield name, text, self._now(_of_cache(field))
        for latency, window in zip(LATENCIES, self._windows, strict=True):
            for percent in PERCENTS:
                text = f"{latency.help}: p{percent} of the latest requests"
                yield f"{latency.name}_p{percent}_seconds", text, partial(window.percentile, percent)

    def _now(self, read: Callable[[SlotStats], float]) -> Callable[[], float]:
        return lambda: math.nan if self._stats is None else read(self._stats)

    def _silence_s(self) -> float:
        return (self._clock.monotonic_ms() - self._updated_ms) / 1e3

    def _oldest_wait_s(self) -> float:
        since_ms = self.waiting_since_ms()
        return 0.0 if since_ms is None else max(0.0, self._clock.wall_ms() - since_ms) / 1e3

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["slot", *labels], namespace=PREFIX, registry=self.registry)

    def _tally(self, name: str, text: str, label: str = "", values: Iterable[str] = ("",)) -> dict[str, int]:
        """The counts of a new tally, by the values of its label."""
        made = CountTally(f"{PREFIX}_{name}", text, self._slot, label, values)
        self.registry.register(made)
        return made.counts

    def _histogram(self, latency: Latency) -> TimeTally:
        made = TimeTally(f"{PREFIX}_{latency.name}_seconds", latency.help, self._slot, latency.buckets_s)
        self.registry.register(made)
        return made

    def _made_process_counters(self) -> list[Any]:
        made: dict[str, Counter] = {}
        found = []
        for one in PROCESS_COUNTERS:
            if one.name not in made:
                made[one.name] = self._counter(one.name, one.help, *(label for label, _ in one.labels))
            found.append(made[one.name].labels(self._slot, *(value for _, value in one.labels)))
        return found


def _whole(read: Callable[[], float], factor: int) -> int:
    value = read() * factor
    return 0 if math.isnan(value) else round(value)


@cache
def slot_metrics(slot: int) -> SlotMetrics:
    """The metrics of a slot, shared by all operators in its worker."""
    return SlotMetrics(slot, SystemClock())


def cause_of(letter: DeadLetter) -> str:
    """The cause of a dead letter in one word, for metrics."""
    if letter.stage == "decode":
        return "invalid"
    if letter.reason.startswith("timeout"):
        return "timeout"
    if letter.reason.startswith("the slot's process died"):
        return "process_died"
    return "engine" if letter.reason.startswith(_ENGINE_FAILED) else "refused"
