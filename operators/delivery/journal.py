"""The topics of a job are its journal: after any failure, requests and answers can be read there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Partition(NamedTuple):
    topic: str
    number: int


@dataclass(frozen=True)
class TopicRecord:
    """One record as it is stored in its topic."""

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes | None
    at_ms: int
    """Timestamp of the record: the broker's or the writer's, as the topic is configured."""


class Journal(Protocol):
    """Reads topics without a consumer group. Raises if they cannot be read, or not in time."""

    def begins(self, topics: Sequence[str]) -> dict[Partition, int]:
        """The first offset of every partition that still exists."""
        ...

    def ends(self, topics: Sequence[str], *, decided: bool = False) -> dict[Partition, int]:
        """The offset of the next record of every partition.

        `decided`: the offset of the first record whose transaction has not ended.
        """
        ...

    def offsets_at(self, topics: Sequence[str], at_ms: int) -> dict[Partition, int]:
        """By partition, the offset of the first record of that time or later, or the end if there is none."""
        ...

    def read(self, spans: Mapping[Partition, range], *, committed: bool) -> Iterator[TopicRecord]:
        """The records at these offsets that still exist, in order within each partition.

        `committed`: leaves out records of aborted transactions, and waits for transactions that have not ended.
        """
        ...
