"""What travels between the operators, and between them and the process of a slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from cache.stats import CacheStats
from core.openai_batch import read_request
from core.records import DeadLetter, Request
from inference_service.stats import EngineStats
from operators.written_response import WrittenResponse


@dataclass(frozen=True)
class RecordPosition:
    """Topic, partition and offset of a record in Kafka. It identifies a request within a job."""

    topic: str
    partition: int
    offset: int

    def __reduce__(self) -> tuple[Any, ...]:
        # A third of the cost of what a dataclass does by itself: each request crosses to the slot's process and back.
        return RecordPosition, (self.topic, self.partition, self.offset)


Source = RecordPosition
"""The name under which release 0.1.0 pickled positions: `operators.envelope_state`."""


@dataclass(frozen=True)
class Envelope:
    """A valid request on its way to its slot. Carries the record's own bytes: they are what state keeps."""

    slot: int
    raw: bytes
    position: RecordPosition
    decoded_at_ms: float
    """Or when it was handed in again after a restart of the job."""
    attempts: int = 0
    """Number of times that the slot's process died while it worked on the request."""
    created_at_ms: float | None = None
    """Stands in for the time of creation in records that have none: lines of OpenAI batch files."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.slot, self.raw, self.position, self.decoded_at_ms, self.attempts, self.created_at_ms)
        return Envelope, fields

    @property
    def request(self) -> Request:
        return Request.from_json(self.raw) if self.created_at_ms is None else read_request(self.raw, self.created_at_ms)

    def unanswered(self, reason: str) -> "Answer":
        """What comes of it where no answer can."""
        letter = DeadLetter.of(
            self.raw,
            reason=reason,
            stage="inference",
            request_id=self.request.request_id,
            topic=self.position.topic,
            partition=self.position.partition,
            offset=self.position.offset,
        )
        return Answer(self.position, letter)


@dataclass(frozen=True)
class WarmUp:
    """Sent once to each slot when the job starts, so that no request waits for a model to load."""

    slot: int


class Ready(BaseModel):
    """What a slot says once its model is loaded and warm."""

    model_config = ConfigDict(frozen=True)

    slot: int
    device: str
    engine: str
    model: str
    dtype: str
    """Data type of weights, keys and values."""
    threads: int
    chunk_bytes: int
    load_s: float


@dataclass(frozen=True)
class SlotStats:
    """Counters since the slot's process loaded its model, and gauges."""

    engine: EngineStats
    cache: CacheStats | None
    """None where nothing is cached."""
    resident_bytes: int
    """Memory of the process; none of its device's."""


@dataclass(frozen=True)
class Queue:
    """What a slot has been given and has not answered."""

    in_flight: int = 0
    waiting: int = 0
    """Those of them that have not begun."""


@dataclass(frozen=True)
class MicroBatch:
    """Requests for a slot that enter its engine together and leave together."""

    envelopes: Sequence[Envelope]


@dataclass(frozen=True)
class Answer:
    """What came of the request that stood at `position`."""

    position: RecordPosition
    record: WrittenResponse | DeadLetter

    def __reduce__(self) -> tuple[Any, ...]:
        return Answer, (self.position, self.record)

    def leaving(self, at_ms: float) -> "Answer":
        """The same answer, which leaves at this time (wall time)."""
        return self if isinstance(self.record, DeadLetter) else Answer(self.position, self.record.leaving(at_ms))
