"""Reading a trace needs the memory of a few rows, whatever its number of rows and sessions."""

import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from workloads.block_trace import TraceFormat, read_blocks
from workloads.catalogue import make_workload
from workloads.config import TraceConfig, WorkloadConfig
from workloads.mooncake import PrefixSessions

FEW, MANY = 2_000, 20_000
KIB = 1 << 10


def rows(trace_format: TraceFormat, count: int) -> Iterator[str]:
    """A trace in which every session, and every block but the first, is new."""
    began = datetime(2023, 11, 16)
    if trace_format is TraceFormat.BURSTGPT:
        yield "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        for at in range(count):
            yield f"{at},s{at},1.0,ChatGPT,1200,20,1220,Conversation log\n"
    elif trace_format is TraceFormat.AZURE:
        yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        for at in range(count):
            yield f"{began + timedelta(seconds=at)},1200,20\n"
    else:
        for at in range(count):
            ids = f"0, {2 * at + 1}, {2 * at + 2}"
            yield f'{{"timestamp": {at}, "input_length": 1200, "output_length": 20, "hash_ids": [{ids}]}}\n'


@pytest.fixture(params=list(TraceFormat))
def trace_format(request: pytest.FixtureRequest) -> TraceFormat:
    return TraceFormat(request.param)


@pytest.fixture
def trace_of(tmp_path: Path, trace_format: TraceFormat) -> Callable[[int], Path]:
    def write(count: int) -> Path:
        path = tmp_path / f"{count}.trace"
        with path.open("w") as file:
            file.writelines(rows(trace_format, count))
        return path

    return write


def peak_bytes(read: Callable[[], int], expected: int) -> int:
    """Peak of allocated bytes while all rows are read."""
    tracemalloc.start()
    try:
        assert read() == expected
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def count(items: Iterator[object]) -> int:
    return sum(1 for _ in items)


def test_blocks_of_ten_times_the_rows_take_no_more_memory(
    trace_of: Callable[[int], Path], trace_format: TraceFormat
) -> None:
    few, many = trace_of(FEW), trace_of(MANY)
    # Run once before, because a library's first use allocates memory that stays.
    small = [peak_bytes(lambda: count(read_blocks(few, trace_format)), FEW) for _ in range(2)][1]
    large = peak_bytes(lambda: count(read_blocks(many, trace_format)), MANY)
    assert large < small + 16 * KIB
    assert large < many.stat().st_size / 4


@pytest.mark.parametrize("trace_format", [TraceFormat.BURSTGPT, TraceFormat.AZURE], indirect=True)
def test_a_replay_of_ten_times_the_rows_takes_no_more_memory(
    trace_of: Callable[[int], Path], trace_format: TraceFormat
) -> None:
    def load(requests: int) -> int:
        replay = TraceConfig(trace=trace_of(requests))
        kind = trace_format.value
        return count(iter(make_workload(WorkloadConfig(workload=kind, requests=requests, replay=replay))))

    small = [peak_bytes(lambda: load(FEW), FEW) for _ in range(2)][1]
    assert peak_bytes(lambda: load(MANY), MANY) < small + 16 * KIB


def test_the_sessions_of_a_mooncake_replay_take_no_more_memory_than_they_may() -> None:
    def tell_apart(prompts: int) -> int:
        sessions = PrefixSessions(shared_blocks=1, remembered=FEW // 2)
        return max(sessions.of([0, 2 * at + 1, 2 * at + 2]) for at in range(prompts))

    # Python's dictionaries grow when keys come and go. A real leak would be ten times as large.
    small = peak_bytes(lambda: tell_apart(FEW), FEW)
    assert peak_bytes(lambda: tell_apart(MANY), MANY) < 2 * small
