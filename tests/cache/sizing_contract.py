"""The contract of every sizing policy, for any load."""

from hypothesis import strategies as st

from cache.config import SizingConfig
from cache.sizing import make_sizing

Requests = list[tuple[float, list[int]]]
"""For each request, the milliseconds since the one before it and the numbers of its keys."""
loads = st.lists(st.tuples(st.floats(0, 5000), st.lists(st.integers(0, 30), max_size=12)), min_size=1, max_size=120)


def config(strategy: str, **changes) -> SizingConfig:
    values = {"capacity_chunks": 100, "min_capacity_chunks": 10, "max_capacity_chunks": 1000, "frequency_buckets": 4}
    return SizingConfig(strategy=strategy, **(values | changes))


def key(number: int, bucket: int = 0) -> bytes:
    """A distinct key for each number, in the given one of four buckets."""
    return (number * 4 + bucket).to_bytes(8, "little") + b"\0" * 24


def check_bounds(strategy: str, requests: Requests) -> None:
    """Check that the capacity stays within its bounds, and changes only at every `adjust_every_requests`-th request."""
    policy = make_sizing(
        config(
            strategy,
            capacity_chunks=20,
            max_capacity_chunks=25,
            adjust_every_requests=5,
            frequency_window_accesses=64,
            mrc_warmup_requests=0,
        )
    )
    now_ms, before = 0.0, policy.capacity_chunks
    assert before == 20
    for count, (gap_ms, numbers) in enumerate(requests, start=1):
        now_ms += gap_ms
        capacity = policy.observe(now_ms, [key(n, n % 4) for n in dict.fromkeys(numbers)])
        assert 10 <= capacity <= 25
        assert capacity == policy.capacity_chunks
        assert capacity == before or count % 5 == 0
        before = capacity
