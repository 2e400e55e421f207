"""Which requests are copies: a client that does not hear of a record's arrival sends it again.

Whether a record is one follows from the topic alone, so that it is the same after every restart, at every parallelism:
what is not known of the time before is read there.
"""

from collections import deque

from core.errors import UserError
from core.openai_batch import read_request
from operators.delivery.journal import Journal, Partition
from operators.envelope import RecordPosition


class RecentIds:
    """The ids among the last so many offsets of one partition; at most that many are in memory."""

    def __init__(self, records: int) -> None:
        self._records = records
        self._latest: dict[str, int] = {}
        self._order: deque[tuple[int, str]] = deque()

    def seen(self, request_id: str, offset: int) -> bool:
        """Whether a record of that id stands among the last before `offset`, and from now on one does. In order."""
        while self._order and self._order[0][0] < offset - self._records:
            old, name = self._order.popleft()
            if self._latest[name] == old:
                del self._latest[name]
        found = request_id in self._latest
        self._latest[request_id] = offset
        self._order.append((offset, request_id))
        return found


class Deduplicator:
    """Tells of each valid request whether one of the same id is among the `records` before it in its partition.

    `committed`: whether requests of aborted transactions are left out, as the job itself never sees them.
    """

    def __init__(self, records: int, journal: Journal, *, committed: bool = True) -> None:
        self._records = records
        self._journal = journal
        self._committed = committed
        self._recent: dict[Partition, RecentIds] = {}
        self.dropped = 0

    def is_copy(self, request_id: str, position: RecordPosition) -> bool:
        """To be asked once for each valid request, in the order of its partition. Raises what the journal raises."""
        partition = Partition(position.topic, position.partition)
        if partition not in self._recent:
            self._recent[partition] = self._read(partition, position.offset)
        copy = self._recent[partition].seen(request_id, position.offset)
        self.dropped += copy
        return copy

    def _read(self, partition: Partition, end: int) -> RecentIds:
        """What was there before this job, or this attempt of it, came to `end`."""
        recent = RecentIds(self._records)
        before = range(max(0, end - self._records), end)
        # Nothing before `end` is in an open transaction: a reader of committed records would not have come to `end`.
        for record in self._journal.read({partition: before}, committed=self._committed) if before else ():
            if record.value is not None and (request_id := _id_of(record.value)) is not None:
                recent.seen(request_id, record.offset)
        return recent


def _id_of(value: bytes) -> str | None:
    try:
        return read_request(value, now_ms=0.0).request_id
    except UserError:
        return None
