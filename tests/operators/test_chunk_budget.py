"""Slots in several processes compute the same shares of one budget, and a dead slot loses its share."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from benchmarks.raw_redis import running_redis
from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.sizing.budget import SlotReport
from core.clock import ManualClock, SystemClock
from core.errors import UserError
from operators.config import JobConfig
from operators.shared_state.chunk_budget import STALE_MS, BudgetShare
from operators.slots.check import check_before_start
from tests.operators.budget_slot import BUDGET, report, shared_reports
from tests.operators.test_slot_loads import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(None, tmp_path_factory.mktemp("budget")) as url:
        yield url


def grants(process: "subprocess.Popen[str]", until: int) -> list[int]:
    """Read the granted shares of the slot up to this one."""
    assert process.stdout is not None
    granted = []
    while not granted or granted[-1] != until:
        line = process.stdout.readline()
        assert line, "the slot's process has ended"
        granted.append(int(line))
    return granted


@pytest.mark.integration
def test_processes_agree_and_the_share_of_one_that_dies_goes_to_the_others(redis_url: str) -> None:
    command = [sys.executable, "-m", "tests.operators.budget_slot", redis_url]
    with ExitStack() as stack:

        def start(slot: int, gain: float) -> "subprocess.Popen[str]":
            process = subprocess.Popen([*command, str(slot), str(gain)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        slots = [start(slot, gain) for slot, gain in enumerate((3.0, 1.0, 2.0))]
        # The minimum for each, then 180 more for the slot with the greatest gain, and the rest for the second.
        for process, share in zip(slots, (200, 20, 80), strict=True):
            grants(process, share)
        watching = shared_reports(redis_url)
        stack.callback(watching.close)
        eventually(lambda: [one.capacity_chunks for one in watching.read().values()] == [200, 20, 80])
        slots[0].kill()
        grants(slots[2], 200)
        grants(slots[1], 100)
        assert set(watching.read()) == {1, 2}


@pytest.mark.integration
def test_what_is_no_report_leaves_the_even_share_and_no_error(redis_url: str) -> None:
    one = shared_reports(redis_url, "broken")
    share = BudgetShare(BUDGET, 0, one, SystemClock())
    try:
        with Redis.from_url(redis_url) as client:
            client.set("broken:gains:1", "[]", px=60_000)
            share.offer(report(1.0, 5))
            eventually(lambda: bool(client.exists("broken:gains:0")))
            eventually(lambda: share.granted_chunks == BUDGET.even_chunks)
            client.delete("broken:gains:1")
        eventually(lambda: share.granted_chunks == BUDGET.greatest_chunks)
    finally:
        share.close()


class Shared(dict[int, SlotReport]):
    """Shared reports in memory. Before and after each access, another slot may act."""

    def __init__(self, turns: Iterator[int]) -> None:
        super().__init__()
        self._turns = turns
        self.shares: list[BudgetShare] = []
        self._inside: set[int] = set()

    def write(self, slot: int, report: SlotReport) -> None:
        self._let_others_in()
        self[slot] = report

    def read(self) -> dict[int, SlotReport]:
        self._let_others_in()
        found = dict(self)
        self._let_others_in()
        return found

    def refresh(self, slot: int) -> None:
        if slot not in self._inside:
            self._inside.add(slot)
            self.shares[slot]._refresh(self)  # type: ignore[arg-type]
            self._inside.remove(slot)

    def _let_others_in(self) -> None:
        other = next(self._turns, -1)
        if 0 <= other < len(self.shares):
            self.refresh(other)


@given(
    st.lists(st.integers(-3, 2), min_size=20, max_size=60),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 2, 3])), min_size=20, max_size=60),
)
@settings(max_examples=120)
def test_slots_never_hold_more_than_the_budget_however_their_steps_interleave(
    turns: list[int], doings: list[tuple[int, int]]
) -> None:
    """A slot refreshes its share, or looks up a prompt: then it takes its share, and its gain has changed."""
    shared = Shared(iter(turns))
    shared.shares = [BudgetShare(BUDGET, slot, None, ManualClock()) for slot in range(BUDGET.slots)]
    held = [BUDGET.even_chunks] * BUDGET.slots
    for slot, share in enumerate(shared.shares):
        share.offer(report(1.0, held[slot]))
        shared[slot] = report(1.0, held[slot])
    for slot, gain in doings:
        if gain:
            held[slot] = shared.shares[slot].granted_chunks
            shared.shares[slot].offer(report(gain, held[slot]))
            assert sum(held) <= BUDGET.chunks
        else:
            shared.refresh(slot)


class Flaky:
    """Shared reports that fail on demand."""

    def __init__(self) -> None:
        self.fails = False

    def write(self, slot: int, report: SlotReport) -> None:
        if self.fails:
            raise ValueError("away")

    def read(self) -> dict[int, SlotReport]:
        return {0: report(5.0, 10), 1: report(1.0, 10)}

    def close(self) -> None:
        pass


def test_a_grant_outlives_a_short_fault_only() -> None:
    clock, flaky = ManualClock(), Flaky()
    share = BudgetShare(BUDGET, 0, flaky, clock)  # type: ignore[arg-type]
    try:
        assert share.granted_chunks == BUDGET.least_chunks
        share.offer(report(5.0, 10))
        eventually(lambda: share.granted_chunks == 200)
        flaky.fails = True
        with pytest.raises(ValueError, match="away"):
            share._refresh(flaky)  # type: ignore[arg-type]
        assert share.granted_chunks == 200
        clock.advance(STALE_MS + 1)
        eventually(lambda: share.granted_chunks == 100)
    finally:
        share.close()


def job(parallelism: int = 2, redis_url: str | None = "redis://h:1/0", **sizing: object) -> JobConfig:
    values = {"strategy": "MRC", "budget_chunks": 200} | sizing
    return JobConfig(
        parallelism=parallelism,
        cache=CacheConfig(sizing=SizingConfig(**values), remote=RemoteConfig(redis_url=redis_url)),
    )


@pytest.mark.parametrize(
    ("config", "granted"),
    [
        (job(), SizingConfig().min_capacity_chunks),
        (job(parallelism=1, redis_url=None), 200),
        (job(budget_chunks=None), None),
        (job(strategy="FLUID"), None),
    ],
)
def test_a_slot_has_a_share_where_there_is_a_budget(config: JobConfig, granted: int | None) -> None:
    share = BudgetShare.of(config, 0, ManualClock())
    assert (None if share is None else share.granted_chunks) == granted
    if share is not None:
        share.close()


def test_a_budget_that_cannot_be_is_refused_before_the_start() -> None:
    with pytest.raises(UserError, match="--budget-chunks: slots share it through Redis; add --redis-url"):
        check_before_start(job(redis_url=None))
    with pytest.raises(ValueError, match="budget_chunks is below min_capacity_chunks of all slots"):
        job(budget_chunks=63)
