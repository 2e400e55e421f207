"""A copy is recognised by the records before it, wherever the reader began."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.delivery.deduplicator import Deduplicator
from operators.delivery.journal import Partition
from operators.envelope import RecordPosition
from tests.operators.memory_journal import MemoryJournal, Transaction, TransactionState

TOPIC = "llm.requests"


def request(request_id: str) -> bytes:
    fields = {"session_id": "s", "user_id": "u", "max_new_tokens": 1, "created_at_ms": 0.0, "prompt": "p"}
    return json.dumps(fields | {"request_id": request_id}).encode()


def journal_of(ids: Sequence[str | None]) -> MemoryJournal:
    """The ids in one partition. None is a record that is not a request."""
    journal = MemoryJournal()
    for name in ids:
        journal.append(TOPIC, 0, None, b"{" if name is None else request(name))
    return journal


def copies(ids: Sequence[str | None], records: int, begin: int = 0) -> list[int]:
    """The offsets of copies, for a job that begins at `begin`."""
    deduplicator = Deduplicator(records, journal_of(ids))
    found = [
        offset
        for offset, name in enumerate(ids)
        if offset >= begin and name is not None and deduplicator.is_copy(name, RecordPosition(TOPIC, 0, offset))
    ]
    assert deduplicator.dropped == len(found)
    return found


def test_a_copy_is_dropped_within_the_window_and_not_beyond() -> None:
    assert copies(["a", "b", "a", "c", "d", "b"], records=3) == [2]
    assert copies(["a", "b", "a", "c", "d", "b"], records=4) == [2, 5]


def test_a_dropped_copy_counts_as_seen() -> None:
    assert copies(["a", "x", "a", "y", "a"], records=2) == [2, 4]


def test_what_is_no_request_makes_no_copies_and_takes_up_room() -> None:
    assert copies(["a", None, None, "a"], records=2) == []
    assert copies(["a", None, "a"], records=2) == [2]


def test_a_request_that_was_aborted_makes_the_next_one_no_copy() -> None:
    """A client whose transaction was aborted sends its requests again with the same ids."""
    journal = MemoryJournal()
    journal.append(TOPIC, 0, None, request("a"), Transaction(TransactionState.ABORTED))
    journal.gap(TOPIC, 0)
    again = journal.append(TOPIC, 0, None, request("a"))
    assert not Deduplicator(10, journal).is_copy("a", RecordPosition(TOPIC, 0, again))
    assert Deduplicator(10, journal, committed=False).is_copy("a", RecordPosition(TOPIC, 0, again))


def test_partitions_are_apart() -> None:
    journal = journal_of(["a"])
    deduplicator = Deduplicator(10, journal)
    assert not deduplicator.is_copy("a", RecordPosition(TOPIC, 0, 0))
    assert not deduplicator.is_copy("a", RecordPosition(TOPIC, 1, 0))


def test_the_time_before_is_read_once_and_not_at_all_where_there_is_none() -> None:
    ids = ["a", "b", "c", "a", "b"]
    journal = journal_of(ids)
    deduplicator = Deduplicator(3, journal)
    assert deduplicator.is_copy("a", RecordPosition(TOPIC, 0, 3))
    assert deduplicator.is_copy("b", RecordPosition(TOPIC, 0, 4))
    assert journal.reads == [{Partition(TOPIC, 0): range(3)}]
    fresh = journal_of(ids)
    Deduplicator(3, fresh).is_copy("a", RecordPosition(TOPIC, 0, 0))
    assert fresh.reads == []


def test_a_kafka_that_can_not_be_read_is_an_error_and_no_guess() -> None:
    class Silent(MemoryJournal):
        def read(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise TimeoutError("nothing")

    deduplicator = Deduplicator(3, Silent())
    for _ in range(2):
        with pytest.raises(TimeoutError):
            deduplicator.is_copy("a", RecordPosition(TOPIC, 0, 5))


@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", None]), max_size=40),
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=0, max_value=40),
)
def test_wherever_one_begins_the_same_records_are_copies(ids: list[str | None], records: int, begin: int) -> None:
    wanted = [at for at, name in enumerate(ids) if name is not None and name in ids[max(0, at - records) : at]]
    assert copies(ids, records) == wanted
    assert copies(ids, records, begin) == [offset for offset in wanted if offset >= begin]


def test_no_more_is_remembered_than_the_window_holds() -> None:
    deduplicator = Deduplicator(100, MemoryJournal())
    for offset in range(10_000):
        deduplicator.is_copy(f"r{offset % 777}", RecordPosition(TOPIC, 0, offset))
    (recent,) = deduplicator._recent.values()
    assert len(recent._latest) <= 101
    assert len(recent._order) <= 101
