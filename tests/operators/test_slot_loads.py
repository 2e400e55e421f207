"""Queue lengths reach the decode operators, and are unknown without Redis."""

import time
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from benchmarks.raw_redis import running_redis
from cache.config import CacheConfig, RemoteConfig
from operators.config import JobConfig, Placement, PlacementConfig
from operators.shared_state.slot_loads import LoadReader, LoadReporter, SharedLoads


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(None, tmp_path_factory.mktemp("loads")) as url:
        yield url


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.integration
def test_what_a_slot_reports_is_what_is_seen_until_it_falls_silent(redis_url: str) -> None:
    queue = [120.0]
    report = LoadReporter(SharedLoads(redis_url, "loads-a", 2), 1, lambda: queue[0])
    view = LoadReader(SharedLoads(redis_url, "loads-a", 2))
    other = LoadReader(SharedLoads(redis_url, "loads-b", 2))
    try:
        eventually(lambda: view.queues_ms == {1: 120.0})
        queue[0] = 7.0
        eventually(lambda: view.queues_ms == {1: 7.0})
        report.close()
        eventually(lambda: view.queues_ms == {})
        assert other.queues_ms == {}
    finally:
        view.close()
        other.close()


@pytest.mark.integration
def test_a_value_that_is_no_number_is_no_queue_and_no_end(redis_url: str) -> None:
    view = LoadReader(SharedLoads(redis_url, "loads-c", 1))
    try:
        with Redis.from_url(redis_url) as client:
            client.set("loads-c:queue:0", "many", px=500)
            eventually(lambda: client.get("loads-c:queue:0") is None)
        SharedLoads(redis_url, "loads-c", 1).write(0, 3.0)
        eventually(lambda: view.queues_ms == {0: 3.0})
    finally:
        view.close()


def test_without_redis_nothing_is_known_and_nothing_raises() -> None:
    view = LoadReader(SharedLoads("redis://127.0.0.1:1/0", "loads-d", 2))
    report = LoadReporter(SharedLoads("redis://127.0.0.1:1/0", "loads-d", 2), 0, lambda: 1.0)
    assert view.queues_ms == {}
    view.close()
    report.close()


@pytest.mark.parametrize(
    ("placement", "redis_url", "parallelism", "there"),
    [
        (Placement.BALANCED, "redis://h:1/0", 2, True),
        (Placement.BALANCED, "redis://h:1/0", 1, False),
        (Placement.BALANCED, None, 2, False),
        (Placement.SESSION, "redis://h:1/0", 2, False),
    ],
)
def test_a_board_is_there_where_it_is_of_use(
    placement: Placement, redis_url: str | None, parallelism: int, there: bool
) -> None:
    config = JobConfig(
        parallelism=parallelism,
        placing=PlacementConfig(placement=placement),
        cache=CacheConfig(remote=RemoteConfig(redis_url=redis_url)),
    )
    assert (SharedLoads.of(config) is not None) is there
