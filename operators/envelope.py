"""The objects that operators exchange with each other and with the processes of the slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from cache.stats import CacheStats
from core.openai_batch import read_request
from core.records import DeadLetter, FinishReason, Request, Response
from inference_service.stats import EngineStats


@dataclass(frozen=True)
class RecordPosition:
    """Topic, partition and offset of a record in Kafka. It identifies a request within a job."""

    topic: str
    partition: int
    offset: int

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickles at a third of the cost of a dataclass's own way. Each request crosses to the slot's process and back.
        return RecordPosition, (self.topic, self.partition, self.offset)


Source = RecordPosition
"""The name under which release 0.1.0 pickled positions: `operators.envelope_state`."""


@dataclass(frozen=True)
class Envelope:
    """A valid request on its way to its slot. Holds the bytes of the record, which is what Flink's state stores."""

    slot: int
    raw: bytes
    position: RecordPosition
    decoded_at_ms: float
    """After a restart of the job: when the request was submitted again."""
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
        """The dead letter of this request."""
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
    """Sent to each slot once when the job starts, so that requests need not wait for the model to load."""

    slot: int


class Ready(BaseModel):
    """The message of a slot whose model is loaded and warm."""

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
    """None if the slot has no cache."""
    resident_bytes: int
    """Memory of the process, without that of its device."""


@dataclass(frozen=True)
class QueueState:
    """Requests that a slot has received and not answered."""

    in_flight: int = 0
    waiting: int = 0
    """Those of `in_flight` that have not begun."""


@dataclass(frozen=True)
class MicroBatch:
    """Requests that enter the engine of a slot together and leave it together."""

    envelopes: Sequence[Envelope]


_UNKNOWN = frozenset({"completed_at_ms", "e2e_ms"})
"""Fields of a response that depend on when it leaves."""


class WrittenResponse(NamedTuple):
    """A response as JSON without the fields of `_UNKNOWN`, and the fields that metrics read. Times are in ms.

    The slot's process writes the JSON because Flink's worker is the busier of the two: all records of the slot pass
    through its one interpreter. The worker adds only the time at which the response leaves the job.
    """

    head: str
    """The JSON object without its last brace."""
    request_id: str
    finish_reason: FinishReason
    local_tokens: int
    remote_tokens: int
    computed_tokens: int
    output_tokens: int
    created_at_ms: float
    completed_at_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    wait_ms: float

    @classmethod
    def of(cls, response: Response) -> "WrittenResponse":
        return cls(
            response.to_json(without=_UNKNOWN)[:-1],
            response.request_id,
            response.finish_reason,
            response.local_tokens,
            response.remote_tokens,
            response.computed_tokens,
            response.output_tokens,
            response.created_at_ms,
            response.completed_at_ms,
            response.ttft_ms,
            response.tpot_ms,
            response.wait_ms,
        )

    @property
    def e2e_ms(self) -> float:
        return self.completed_at_ms - self.created_at_ms

    def leaving(self, at_ms: float) -> "WrittenResponse":
        """The same response with the time at which it leaves (wall time)."""
        # A third of the cost of `_replace`.
        return WrittenResponse._make((*self[:_COMPLETED], at_ms, *self[_COMPLETED + 1 :]))

    def to_json(self) -> str:
        """The whole response, like `Response.to_json` with the fields in another order."""
        return f'{self.head},"completed_at_ms":{self.completed_at_ms!r},"e2e_ms":{self.e2e_ms!r}}}'


_COMPLETED = WrittenResponse._fields.index("completed_at_ms")


@dataclass(frozen=True)
class Answer:
    """The response or dead letter for the request at `position`."""

    position: RecordPosition
    record: WrittenResponse | DeadLetter

    def __reduce__(self) -> tuple[Any, ...]:
        return Answer, (self.position, self.record)

    def leaving(self, at_ms: float) -> "Answer":
        """The same answer with the time at which it leaves (wall time)."""
        return self if isinstance(self.record, DeadLetter) else Answer(self.position, self.record.leaving(at_ms))
