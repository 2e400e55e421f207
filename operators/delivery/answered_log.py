"""Finds requests that were answered before a failure, so that the model does not answer them again.

After a restart, the job gets the requests after its last checkpoint again, and those that were in flight then. Some of
them have an answer already. The job finds it in the topics of responses and dead letters, by the id of the request.
These topics are read when the first such request comes, starting at the time of the oldest one. They are not read while
the job runs without failures, nor if it starts on new topics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from core.kafka_config import KafkaConfig
from core.records import DeadLetter
from operators.delivery.journal import Journal, Partition, TopicRecord
from operators.envelope import Envelope, RecordPosition


@dataclass(frozen=True)
class UncommittedAnswer:
    """An answer that readers of committed records could not see when this log was read."""

    record: TopicRecord
    was_open: bool
    """True if its transaction had not ended then, false if it was aborted."""


class AnsweredLog:
    """The answers of earlier attempts of the job. Must be made before this attempt reads any request.

    Its methods raise what the journal raises.
    """

    def __init__(self, kafka: KafkaConfig, clock_margin_ms: int, journal: Journal) -> None:
        self._kafka = kafka
        self._topics = (kafka.responses_topic, kafka.dead_letters_topic)
        self._margin_ms = clock_margin_ms
        self._journal = journal
        self._new_from = journal.ends([kafka.requests_topic])
        """By partition of the requests topic, the first offset that no earlier attempt can have seen."""
        self._oldest: dict[Partition, int] = {}
        """By partition, the offset of the oldest request that was looked up."""
        self._covered: dict[Partition, int] = {}
        """By partition of the answer topics, the first offset that was read. All up to the first known end was."""
        self._visible: set[str] = set()
        self._hidden: dict[str, list[UncommittedAnswer]] = {}
        self.answered = 0
        self.written_again = 0

    def look(self, envelope: Envelope) -> Sequence[TopicRecord] | None:
        """Look for the answer to a request. None: there is none, and the request must be sent to the slot.

        Otherwise the request must not be sent. The returned records must be written: this is the answer again if its
        transaction was aborted, and nothing if it can be read.
        """
        position = envelope.position
        if position.offset >= self._new_from.get(_partition(position), 0):
            return None
        self._cover(position)
        request_id = envelope.request.request_id
        hidden = self._hidden.get(request_id, [])
        if request_id in self._visible or any(map(self._is_committed, hidden)):
            self.answered += 1
            return ()
        if hidden:
            self.written_again += 1
            return (hidden[-1].record,)
        return None

    def _cover(self, position: RecordPosition) -> None:
        """Read the answer topics as far back as the answer to the request at `position` can be."""
        partition = _partition(position)
        if position.offset >= self._oldest.get(partition, position.offset + 1):
            return
        self._oldest[partition] = position.offset
        # Later records of a partition are assumed to be at most the margin older than earlier ones.
        asked = list(self._journal.read({partition: range(position.offset, position.offset + 1)}, committed=False))
        begins = self._journal.offsets_at(self._topics, asked[0].at_ms - self._margin_ms if asked else 0)
        if not self._covered:
            self._covered = self._journal.ends(self._topics)
        spans = {place: range(begins[place], end) for place, end in self._covered.items() if begins[place] < end}
        self._covered |= {place: span.start for place, span in spans.items()}
        if spans:
            self._read(spans)

    def _read(self, spans: Mapping[Partition, range]) -> None:
        open_from = self._journal.ends(self._topics, decided=True)
        decided = {place: range(span.start, min(span.stop, open_from[place])) for place, span in spans.items()}
        gapless_to = {place: span.start for place, span in spans.items()}
        for record in self._journal.read(decided, committed=True):
            gapless_to[record.partition] += record.offset == gapless_to[record.partition]
            self._visible.update(self._answered_by(record))
        # Without transactions nothing is left to read. With them, each ends with a marker, which is a gap in offsets.
        rest = {place: range(gapless_to[place], span.stop) for place, span in spans.items()}
        for record in self._journal.read(rest, committed=False):
            for request_id in self._answered_by(record) - self._visible:
                found = UncommittedAnswer(record, record.offset >= open_from[record.partition])
                self._hidden.setdefault(request_id, []).append(found)

    def _is_committed(self, hidden: UncommittedAnswer) -> bool:
        """True if the answer has been committed since. Waits until its transaction has ended."""
        if not hidden.was_open:
            return False
        # This attempt wrote nothing before that offset, so open transactions there end without it.
        partition, offset = hidden.record.partition, hidden.record.offset
        return any(True for _ in self._journal.read({partition: range(offset, offset + 1)}, committed=True))

    def _answered_by(self, record: TopicRecord) -> set[str]:
        """The id of the request that `record` answers. Empty for dead letters of invalid records."""
        if record.partition.topic == self._kafka.responses_topic:
            return set() if record.key is None else {record.key.decode(errors="replace")}
        try:
            letter = DeadLetter.model_validate_json(record.value or b"")
        except ValidationError:
            return set()
        return {letter.request_id} if letter.stage == "inference" and letter.request_id is not None else set()


def _partition(position: RecordPosition) -> Partition:
    return Partition(position.topic, position.partition)
