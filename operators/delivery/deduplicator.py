"""Detects copies of requests: a client that gets no acknowledgement sends its record again.

The topic alone decides which record is a copy, so the result is the same after every restart and at every parallelism.
After a restart, the earlier records that matter are read from the topic.
"""

from collections import deque

from core.errors import UserError
from core.openai_batch import read_request
from operators.delivery.journal import Journal, Partition
from operators.envelope import RecordPosition


class RecentIds:
    """The request ids at the last `records` offsets of one partition. At most that many are in memory."""

    def __init__(self, records: int) -> None:
        self._records = records
        self._latest: dict[str, int] = {}
        self._order: deque[tuple[int, str]] = deque()

    def seen(self, request_id: str, offset: int) -> bool:
        """Add the request at `offset`. True if its id is among the recent ones. Offsets must rise from call to call."""
        while self._order and self._order[0][0] < offset - self._records:
            old, name = self._order.popleft()
            if self._latest[name] == old:
                del self._latest[name]
        found = request_id in self._latest
        self._latest[request_id] = offset
        self._order.append((offset, request_id))
        return found


class Deduplicator:
    """A request is a copy if one of the same id is among the `records` offsets before it in its partition.

    `committed`: requests of aborted transactions do not count, because the job never sees them.
    """

    def __init__(self, records: int, journal: Journal, *, committed: bool = True) -> None:
        self._records = records
        self._journal = journal
        self._committed = committed
        self._recent: dict[Partition, RecentIds] = {}
        self.dropped = 0

    def is_copy(self, request_id: str, position: RecordPosition) -> bool:
        """True for a copy. Call it once for each valid request, in the order of the partition.

        Raises what the journal raises.
        """
        partition = Partition(position.topic, position.partition)
        if partition not in self._recent:
            self._recent[partition] = self._read(partition, position.offset)
        copy = self._recent[partition].seen(request_id, position.offset)
        self.dropped += copy
        return copy

    def _read(self, partition: Partition, end: int) -> RecentIds:
        """Read the ids in front of `end`, where this attempt of the job begins."""
        recent = RecentIds(self._records)
        before = range(max(0, end - self._records), end)
        # No transaction is open before `end`, or a reader of committed records could not have reached `end`.
        for record in self._journal.read({partition: before}, committed=self._committed) if before else ():
            if record.value is not None and (request_id := _id_of(record.value)) is not None:
                recent.seen(request_id, record.offset)
        return recent


def _id_of(value: bytes) -> str | None:
    try:
        return read_request(value, now_ms=0.0).request_id
    except UserError:
        return None
