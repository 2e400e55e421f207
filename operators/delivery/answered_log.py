"""What was answered before a failure, so that it is not asked again.

After a restart the job sees again what it read after its last checkpoint, and what was in flight then; some of both has
been answered meanwhile. The topics of answers tell which: under the id of the request, written after it. They are read
when the first such request comes, from the time of the oldest on, and never where a job starts on new topics or runs.
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
    """An answer that could not be seen when it was read."""

    record: TopicRecord
    was_open: bool
    """Its transaction had not ended then; else it was aborted."""


class AnsweredLog:
    """The answers of the job's earlier attempts. To be made before the attempt reads any request.

    Raises what the journal raises.
    """

    def __init__(self, kafka: KafkaConfig, clock_margin_ms: int, journal: Journal) -> None:
        self._kafka = kafka
        self._topics = (kafka.responses_topic, kafka.dead_letters_topic)
        self._margin_ms = clock_margin_ms
        self._journal = journal
        self._new_from = journal.ends([kafka.requests_topic])
        """Where in the requests topic begins what no earlier attempt can have seen."""
        self._oldest: dict[Partition, int] = {}
        """The oldest request of each partition that was looked for."""
        self._covered: dict[Partition, int] = {}
        """From where on each topic of answers has been read, up to where it ended at first."""
        self._visible: set[str] = set()
        self._hidden: dict[str, list[UncommittedAnswer]] = {}
        self.answered = 0
        self.written_again = 0

    def look(self, envelope: Envelope) -> Sequence[TopicRecord] | None:
        """None where the request has no answer: it is to be asked.

        Else it is not, and the records are to be written that it returns: the recorded answer where nobody can see it,
        as its transaction was aborted, and otherwise nothing.
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
        """Read as far back as the answer of the request at `position` may stand."""
        partition = _partition(position)
        if position.offset >= self._oldest.get(partition, position.offset + 1):
            return
        self._oldest[partition] = position.offset
        # In the order of a partition requests are taken to be no older than the margin than those before.
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
        # Without transactions nothing is left; behind each of them is a gap at least.
        rest = {place: range(gapless_to[place], span.stop) for place, span in spans.items()}
        for record in self._journal.read(rest, committed=False):
            for request_id in self._answered_by(record) - self._visible:
                found = UncommittedAnswer(record, record.offset >= open_from[record.partition])
                self._hidden.setdefault(request_id, []).append(found)

    def _is_committed(self, hidden: UncommittedAnswer) -> bool:
        """Whether it has become visible meanwhile; waits until that is decided."""
        if not hidden.was_open:
            return False
        # Nothing of this attempt stands before it, so that whatever is open there ends without this attempt.
        partition, offset = hidden.record.partition, hidden.record.offset
        return any(True for _ in self._journal.read({partition: range(offset, offset + 1)}, committed=True))

    def _answered_by(self, record: TopicRecord) -> set[str]:
        """The request that it is an answer to; none for the letter of a record that was no request, and a stranger."""
        if record.partition.topic == self._kafka.responses_topic:
            return set() if record.key is None else {record.key.decode(errors="replace")}
        try:
            letter = DeadLetter.model_validate_json(record.value or b"")
        except ValidationError:
            return set()
        return {letter.request_id} if letter.stage == "inference" and letter.request_id is not None else set()


def _partition(position: RecordPosition) -> Partition:
    return Partition(position.topic, position.partition)
