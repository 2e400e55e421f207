"""The soak's load uses each id once, its trend is a fitted line, and each process is sampled under its own name."""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.conversations import SteadyConversations
from benchmarks.memory import MemorySampler, Sample
from benchmarks.soak import by_process, figures_of
from benchmarks.soak_figure import soak_figure
from benchmarks.trend import Trend
from experiments.collector import Ledger
from local_stack import LocalStack, StackConfig


def test_conversations_end_and_new_ones_come_under_ids_of_their_own() -> None:
    load = SteadyConversations(requests=400, rate_per_s=4.0, seed=1, sessions=4, turns=5)
    requests = list(load)
    assert [one.at_ms for one in requests] == [250.0 * index for index in range(400)]
    assert len({one.request_id for one in requests}) == 400
    turns = Counter(one.session_id for one in requests)
    assert max(turns.values()) == 5
    assert len(turns) >= 400 / 5
    for session_id in turns:
        places = [index for index, one in enumerate(requests) if one.session_id == session_id]
        assert places == list(range(places[0], places[0] + 4 * len(places), 4))
        for before, after in pairwise(places):
            assert requests[after].prompt.startswith(requests[before].prompt)
    assert max(len(one.prompt or "") for one in requests) <= load.longest_prompt_tokens
    assert requests == list(load)


def test_a_trend_is_that_of_the_second_half() -> None:
    seconds = [10.0 * index for index in range(361)]
    # Fills up for half an hour, then grows by 12 MiB an hour, 1 MiB up and down.
    mib = [min(at / 18, 100.0) + max(0.0, at - 1800) / 300 + (-1) ** index for index, at in enumerate(seconds)]
    trend = Trend.of_second_half(seconds, mib)
    assert trend is not None
    assert trend.begin_s == 1800
    assert trend.slope_mib_per_h == pytest.approx(12, abs=0.2)
    assert trend.scatter_mib == pytest.approx(1, abs=0.02)
    assert 0.2 < trend.error_mib_per_h < 1
    assert trend.at(3600) == pytest.approx(106, abs=0.3)
    assert Trend.of_second_half([0.0, 5.0], [1.0, 2.0]) is None


def test_a_figure_and_figures_are_made_of_samples(tmp_path: Path) -> None:
    samples = [
        Sample(5.0 * index, name, kind, 100.0 + index)
        for index in range(20)
        for name, kind in (("taskmanager-1 slot 1", "slot"), ("redis", "redis"))
    ]
    series, kinds = by_process(samples)
    trends = {name: trend for name, points in series.items() if (trend := Trend.of_second_half(*points)) is not None}
    figures = figures_of(Ledger(), trends, series)
    assert figures["redis MiB/h"] == pytest.approx(720)
    assert figures["taskmanager-1 slot 1 MiB at the end"] == 119
    soak_figure(series, kinds, trends, "said", tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 20_000


@pytest.mark.integration
def test_what_runs_is_sampled(stack: LocalStack, tmp_path: Path) -> None:
    shared = stack.addresses()
    own = StackConfig.on_free_ports(tmp_path, brokers=shared.brokers, flink_url=shared.flink_rest_url)
    with LocalStack(own) as redis_only:
        for sampled, names in ((stack, {"jobmanager", "taskmanager-1", "kafka", "redis"}), (redis_only, {"redis"})):
            with MemorySampler(sampled, every_s=0.1) as sampler:
                deadline_s = time.monotonic() + 20
                while len({sample.at_s for sample in sampler.samples}) < 3:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.02)
            assert {sample.process for sample in sampler.samples if "taskmanager-1 " not in sample.process} == names
            assert all(sample.mib > 0.5 for sample in sampler.samples)
