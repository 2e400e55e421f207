"""A batch closes by size or by time, and every item leaves in exactly one batch."""

from hypothesis import given
from hypothesis import strategies as st

from operators.batching import MicroBatcher


def test_closes_at_the_count() -> None:
    batcher: MicroBatcher[int] = MicroBatcher(3, max_wait_ms=100)
    assert [batcher.add(item, 0) for item in range(4)] == [[], [], [0, 1, 2], []]
    assert batcher.flush() == [3]


def test_closes_when_the_first_has_waited_long_enough() -> None:
    batcher: MicroBatcher[str] = MicroBatcher(8, max_wait_ms=100)
    batcher.add("first", 1000)
    batcher.add("second", 1090)
    assert batcher.due_ms == 1100
    assert batcher.expire(1099.9) == []
    assert batcher.expire(1100) == ["first", "second"]
    assert batcher.due_ms is None
    assert batcher.expire(5000) == []


def test_a_timer_of_an_older_batch_does_not_close_a_younger_one() -> None:
    batcher: MicroBatcher[str] = MicroBatcher(2, max_wait_ms=100)
    batcher.add("a", 0)
    assert batcher.add("b", 90) == ["a", "b"]
    batcher.add("c", 95)
    assert batcher.expire(100) == []
    assert batcher.expire(195) == ["c"]


@given(
    st.integers(1, 9),
    st.floats(0, 50),
    st.lists(st.tuples(st.sampled_from(["add", "timer", "end"]), st.floats(0, 30)), max_size=60),
)
def test_nothing_is_lost_doubled_or_reordered(size: int, max_wait_ms: float, events: list[tuple[str, float]]) -> None:
    batcher: MicroBatcher[int] = MicroBatcher(size, max_wait_ms)
    now_ms, added, left = 0.0, 0, []
    arrived_ms: dict[int, float] = {}
    for kind, passed_ms in events:
        now_ms += passed_ms
        if kind == "add":
            arrived_ms[added] = now_ms
            batch = batcher.add(added, now_ms)
            added += 1
            assert len(batch) in (0, size)
        elif kind == "timer":
            batch = batcher.expire(now_ms)
            assert all(now_ms >= arrived_ms[item] + max_wait_ms for item in batch[:1])
        else:
            batch = batcher.flush()
        assert len(batch) <= size
        left += batch
        assert len(batcher) < size
    assert left + batcher.flush() == list(range(added))
