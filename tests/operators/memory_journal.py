"""A journal in memory with transactions. Readers see what they would see in Kafka."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from operators.delivery.journal import Partition, TopicRecord


class TransactionState(Enum):
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass
class Transaction:
    outcome: TransactionState = TransactionState.OPEN


NONE = Transaction(TransactionState.COMMITTED)
"""The transaction of records written outside of a transaction."""


@dataclass
class MemoryJournal:
    """`logs[partition][offset]` is the record and its transaction; none if the record is gone."""

    partitions: int = 1
    logs: dict[Partition, list[tuple[TopicRecord, Transaction] | None]] = field(
        default_factory=lambda: defaultdict(list)
    )
    now_ms: int = 1_000_000
    reads: list[dict[Partition, range]] = field(default_factory=list)

    def append(
        self, topic: str, number: int, key: str | None, value: bytes | None, transaction: Transaction = NONE
    ) -> int:
        partition = Partition(topic, number)
        log = self.logs[partition]
        record = TopicRecord(partition, len(log), None if key is None else key.encode(), value, self.now_ms)
        log.append((record, transaction))
        return record.offset

    def gap(self, topic: str, number: int) -> None:
        """Add an offset without a record: a transaction's marker, or a record that is gone."""
        self.logs[Partition(topic, number)].append(None)

    def close(self) -> None:
        pass

    def begins(self, topics: Sequence[str]) -> dict[Partition, int]:
        return {place: next((at for at, one in enumerate(self.logs[place]) if one), 0) for place in self._all(topics)}

    def ends(self, topics: Sequence[str], *, decided: bool = False) -> dict[Partition, int]:
        return {place: self._first_open(place) if decided else len(self.logs[place]) for place in self._all(topics)}

    def offsets_at(self, topics: Sequence[str], at_ms: int) -> dict[Partition, int]:
        def first(place: Partition) -> int:
            log = self.logs[place]
            return next((at for at, one in enumerate(log) if one and one[0].at_ms >= at_ms), len(log))

        return {place: first(place) for place in self._all(topics)}

    def read(self, spans: Mapping[Partition, range], *, committed: bool) -> Iterator[TopicRecord]:
        self.reads.append({place: span for place, span in spans.items() if span})
        for place, span in spans.items():
            if committed and span and self._first_open(place) < min(span.stop, len(self.logs[place])):
                raise TimeoutError(f"{place}: a transaction is open")
            for one in self.logs[place][span.start : span.stop] if span else ():
                if one is not None and (not committed or one[1].outcome is TransactionState.COMMITTED):
                    yield one[0]

    def _first_open(self, place: Partition) -> int:
        log = self.logs[place]
        return next((at for at, one in enumerate(log) if one and one[1].outcome is TransactionState.OPEN), len(log))

    def _all(self, topics: Sequence[str]) -> list[Partition]:
        return [Partition(topic, number) for topic in topics for number in range(self.partitions)]
