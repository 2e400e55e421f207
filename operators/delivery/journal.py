"""The topics of a job are its journal: what was asked and what was answered can be read there after any failure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Partition(NamedTuple):
    topic: str
    number: int


@dataclass(frozen=True)
class TopicRecord:
    """One record of a topic, as it lies there."""

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes | None
    at_ms: int
    """The topic's own time of it: the broker's, or the writer's."""


class Journal(Protocol):
    """Reads topics outside any group. Whatever cannot be read in time, or at all, raises."""

    def begins(self, topics: Sequence[str]) -> dict[Partition, int]:
        """The first offset that is still there, of every partition."""
        ...

    def ends(self, topics: Sequence[str], *, decided: bool = False) -> dict[Partition, int]:
        """The offset of the next record of every partition; `decided`: of the first whose transaction has not ended."""
        ...

    def offsets_at(self, topics: Sequence[str], at_ms: int) -> dict[Partition, int]:
        """The first offset whose record is of that time or later, of every partition; its end if there is none."""
        ...

    def read(self, spans: Mapping[Partition, range], *, committed: bool) -> Iterator[TopicRecord]:
        """The records of these offsets that are still there, each partition's in order.

        `committed`: without those of transactions that were aborted; waits for transactions that have not ended.
        """
        ...
