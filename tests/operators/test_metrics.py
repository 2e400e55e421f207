"""The metrics of a slot: in the format of Prometheus, and as integers for Flink."""

import logging
import math
import socket
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cache.stats import CacheStats
from core.clock import ManualClock
from core.records import DeadLetter, FinishReason
from inference_service.completion import timed_out
from inference_service.stats import EngineStats
from operators.config import JobConfig, MetricsConfig
from operators.envelope import QueueState, SlotStats, WrittenResponse
from operators.metrics import endpoint as metrics_endpoint
from operators.metrics.endpoint import MetricsEndpoint
from operators.metrics.sliding_window import MOST, SPAN_MS, SlidingWindow
from operators.metrics.slot_metrics import SlotMetrics, cause_of
from operators.slots.retry_tracker import RetryTracker
from tests.experiments import experiment_samples
from tests.operators.test_slot import envelope

WAIT_S = 20.0
"""Time limit of waits, which only a failure reaches."""
NO_CACHE = dict.fromkeys(CacheStats.__dataclass_fields__, 0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def metrics(clock: ManualClock) -> SlotMetrics:
    return SlotMetrics(3, clock)


def samples(metrics: SlotMetrics) -> dict[str, float]:
    """The samples that Prometheus would read, by name and labels without the slot."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        assert family.name.startswith("infertuner_")
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("slot") == "3"
            if not sample.name.endswith("_created"):
                name = sample.name.removeprefix("infertuner_")
                found[" ".join([name, *(f"{label}={value}" for label, value in sorted(labels.items()))])] = sample.value
    return found


def changed(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in after.items() if before.get(name) != value and not math.isnan(value)}


def response(**fields: Any) -> WrittenResponse:
    return WrittenResponse.of(experiment_samples.response(**fields))


def letter(reason: str, stage: str = "inference") -> DeadLetter:
    return DeadLetter.of(b"", reason, stage=stage, topic="t", partition=0, offset=1)


def stats(resident_bytes: int = 1 << 20, cache: dict[str, int] | None = None, **engine: int) -> SlotStats:
    of_cache = None if cache is None else CacheStats(**(NO_CACHE | cache))
    return SlotStats(EngineStats(**engine), of_cache, resident_bytes)


def test_an_answer_is_counted_by_why_it_ended_and_its_tokens_by_where_they_came_from(metrics: SlotMetrics) -> None:
    before = samples(metrics)
    for reason in ("length", "stop"):
        metrics.answered(
            response(local_tokens=64, remote_tokens=32, computed_tokens=5, output_tokens=7, finish_reason=reason)
        )
    found = changed(before, samples(metrics))
    assert found["requests_total finish_reason=length"] == found["requests_total finish_reason=stop"] == 1
    assert [found[f"prompt_tokens_total source={name}"] for name in ("local", "remote", "computed")] == [128, 64, 10]
    assert found["output_tokens_total"] == 14
    assert not any(name.startswith("dead_letters") for name in found)


def test_the_times_of_an_answer_are_in_seconds(metrics: SlotMetrics) -> None:
    metrics.answered(response(e2e_ms=200.0, ttft_ms=80.0, tpot_ms=30.0, wait_ms=20.0))
    metrics.answered(response(e2e_ms=400.0, ttft_ms=None, tpot_ms=None, wait_ms=40.0))
    found = samples(metrics)
    sums = {name: (found[f"{name}_seconds_count"], found[f"{name}_seconds_sum"]) for name in ("e2e", "ttft", "tpot")}
    assert sums == {"e2e": (2, pytest.approx(0.6)), "ttft": (1, 0.08), "tpot": (1, 0.03)}
    assert (found["e2e_seconds_bucket le=0.25"], found["e2e_seconds_bucket le=0.5"]) == (1, 2)
    assert found["e2e_p50_seconds"] == pytest.approx(0.3)
    assert found["wait_p95_seconds"] == pytest.approx(0.039)


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (timed_out(1000.0), "timeout"),
        ("prefill failed: RuntimeError: x", "engine"),
        ("decode failed: OutOfMemoryError: x", "engine"),
        ("prompt: 64 tokens are too many", "refused"),
    ],
)
def test_a_dead_letter_is_counted_by_its_cause(metrics: SlotMetrics, reason: str, cause: str) -> None:
    metrics.answered(letter(reason))
    assert samples(metrics)[f"dead_letters_total cause={cause} stage=inference"] == 1


def test_a_clients_clock_that_is_ahead_makes_no_sum_fall(metrics: SlotMetrics, clock: ManualClock) -> None:
    metrics.answered(response(e2e_ms=1000.0, ttft_ms=900.0))
    before = samples(metrics)
    metrics.answered(response(e2e_ms=-600_000.0, ttft_ms=-600_100.0))
    clock.advance(2000)  # percentiles are computed once a second
    after = samples(metrics)
    for name, sum_s in (("e2e", 1.0), ("ttft", 0.9)):
        assert before[f"{name}_seconds_sum"] == after[f"{name}_seconds_sum"] == pytest.approx(sum_s)
        assert after[f"{name}_seconds_count"] == 2
        assert after[f"{name}_seconds_bucket le=0.05"] == 1
    assert after["e2e_p50_seconds"] == pytest.approx(0.5)


def test_a_record_that_is_no_request_is_counted_as_such(metrics: SlotMetrics) -> None:
    metrics.answered(letter("prompt: missing; add it", stage="decode"))
    assert samples(metrics)["dead_letters_total cause=invalid stage=decode"] == 1


def test_who_the_process_dies_of_has_a_cause_of_its_own() -> None:
    made = RetryTracker(1, 0.0)
    made.take(envelope(1))
    made.began([made.give()[0].position])
    (answer,) = made.lost("was ended by SIGKILL")
    assert cause_of(answer.record) == "process_died"  # type: ignore[union-attr,arg-type]


def test_counts_of_the_process_go_on_when_another_one_begins_with_nothing(metrics: SlotMetrics) -> None:
    hits = "cache_hit_chunks_total tier=local"
    counts = []
    for passes, chunks in ((10, 4), (25, 9)):
        metrics.update(stats(passes=passes, cache={"local_chunks_hit": chunks}))
        counts.append((samples(metrics)["passes_total"], samples(metrics)[hits]))
    metrics.set_ready(False)
    metrics.set_ready(True)
    metrics.update(stats(passes=5, cache={"local_chunks_hit": 2}))
    counts.append((samples(metrics)["passes_total"], samples(metrics)[hits]))
    assert counts == [(10, 4), (25, 9), (30, 11)]


def test_what_the_process_holds_is_told_while_there_is_one(metrics: SlotMetrics) -> None:
    names = ("running_requests", "cache_used_chunks", "cache_write_queue_bytes", "slot_resident_bytes")
    assert all(math.isnan(samples(metrics)[name]) for name in names)
    metrics.update(stats(resident_bytes=5, running=4, cache={"used_chunks": 7, "queued_bytes": 9}))
    assert [samples(metrics)[name] for name in names] == [4, 7, 9, 5]
    metrics.set_ready(False)
    assert all(math.isnan(samples(metrics)[name]) for name in names)


def test_a_slot_without_a_cache_has_nothing_in_it(metrics: SlotMetrics) -> None:
    metrics.update(stats())
    assert samples(metrics)["cache_used_chunks"] == 0
    assert samples(metrics)["cache_hit_chunks_total tier=remote"] == 0


def test_whether_a_process_serves_and_how_long_it_has_been_silent(metrics: SlotMetrics, clock: ManualClock) -> None:
    assert samples(metrics)["slot_up"] == 0
    clock.advance(9000.0)
    metrics.set_ready(True)
    assert samples(metrics)["slot_silence_seconds"] == 0
    metrics.update(stats())
    clock.advance(2500.0)
    assert (samples(metrics)["slot_up"], samples(metrics)["slot_silence_seconds"]) == (1, 2.5)
    metrics.set_ready(False)
    assert samples(metrics)["slot_up"] == 0


def test_how_many_decode_together_is_of_the_time_since_the_last_sign_of_life(metrics: SlotMetrics) -> None:
    metrics.update(stats(decode_passes=10, decoded_tokens=10))
    metrics.update(stats(decode_passes=20, decoded_tokens=70))
    assert samples(metrics)["decode_rows"] == 6
    metrics.update(stats(decode_passes=20, decoded_tokens=70))
    assert samples(metrics)["decode_rows"] == 0


def test_the_queue_is_what_has_not_begun(metrics: SlotMetrics, clock: ManualClock) -> None:
    made = RetryTracker(3, 0.0)
    metrics.queue, metrics.waiting_since_ms = lambda: made.queue, lambda: made.waiting_since_ms
    assert (made.queue, made.waiting_since_ms) == (QueueState(0, 0), None)
    assert samples(metrics)["oldest_wait_seconds"] == 0
    for number, decoded_at_ms in ((1, 400.0), (2, 600.0), (3, 800.0)):
        made.take(replace(envelope(number), decoded_at_ms=decoded_at_ms))
    made.began([made.give()[0].position])
    names = ("in_flight_requests", "waiting_requests", "oldest_wait_seconds")
    assert [samples(metrics)[name] for name in names] == [3, 2, 0.4]
    made.lost("hung")
    assert [samples(metrics)[name] for name in names] == [3, 3, 0.6]


def test_flink_has_some_of_the_gauges_in_whole_numbers(metrics: SlotMetrics) -> None:
    metrics.update(stats(running=4, decode_passes=2, decoded_tokens=5))
    metrics.answered(response(e2e_ms=212.4))
    metrics.queue = lambda: QueueState(4, 3)
    gauges = {name: read() for name, read in metrics.flink_gauges().items()}
    assert {type(value) for value in gauges.values()} == {int}
    assert (gauges["infertuner_in_flight_requests"], gauges["infertuner_waiting_requests"]) == (4, 3)
    assert gauges["infertuner_e2e_p95_milliseconds"] == 212
    assert gauges["infertuner_slot_up"] == 0
    assert SlotMetrics(0, ManualClock()).flink_gauges()["infertuner_e2e_p95_milliseconds"]() == 0
    named = {name.replace("_milliseconds", "_seconds").removeprefix("infertuner_") for name in gauges}
    assert named <= samples(metrics).keys()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_percentiles_are_those_of_all_that_is_recent(values: list[float]) -> None:
    clock = ManualClock()
    window = SlidingWindow(clock)
    window.add(1e9, clock.monotonic_ms())
    clock.advance(SPAN_MS)
    for value in values:
        window.add(value, clock.monotonic_ms())
    for percent in (50, 95, 99):
        assert window.percentile(percent) == pytest.approx(np.percentile(values, percent))


def test_a_window_is_bounded_and_forgets(clock: ManualClock) -> None:
    window = SlidingWindow(clock)
    assert math.isnan(window.percentile(50))
    for value in range(3 * MOST):
        window.add(float(value), clock.monotonic_ms())
    clock.advance(1000.0)
    assert window.percentile(50) == pytest.approx(2.5 * MOST, abs=1)
    assert len(window._values) == MOST
    clock.advance(SPAN_MS)
    assert math.isnan(window.percentile(50))


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
        return str(answer.read().decode())


def test_the_endpoint_is_served_as_soon_as_its_port_is_free(
    metrics: SlotMetrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_endpoint, "RETRY_S", 0.01)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        endpoint = MetricsEndpoint("127.0.0.1", port, metrics.registry)
        deadline_s = time.monotonic() + WAIT_S
        while not caplog.records:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert not endpoint.serving.is_set()
    with closing(endpoint):
        assert endpoint.serving.wait(WAIT_S)
        metrics.answered(response())
        families = {family.name: family for family in text_string_to_metric_families(scraped(port))}
        counts = {
            sample.labels["finish_reason"]: sample.value
            for sample in families["infertuner_requests"].samples
            if sample.name == "infertuner_requests_total"
        }
        assert counts == {reason: float(reason == "length") for reason in FinishReason}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"metrics are not served at 127.0.0.1:{port}" in caplog.text
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def test_every_slot_needs_a_port() -> None:
    JobConfig(parallelism=2, metrics=MetricsConfig(metrics_port=65_534))
    with pytest.raises(ValueError, match="metrics_port leaves no port for the last slot"):
        JobConfig(parallelism=3, metrics=MetricsConfig(metrics_port=65_534))
