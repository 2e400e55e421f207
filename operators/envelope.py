"""What travels between the operators: a decoded request with where it came from, or the call to warm up."""

from dataclasses import dataclass

from core.records import Request


@dataclass(frozen=True)
class Source:
    """Place of a record in Kafka."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Envelope:
    """A valid request on its way to its slot. Carries the record's own bytes: they are what state keeps."""

    slot: int
    raw: bytes
    source: Source
    decoded_at_ms: float

    @property
    def request(self) -> Request:
        return Request.from_json(self.raw)


@dataclass(frozen=True)
class WarmUp:
    """Sent once to each slot when the job starts, so that no request waits for a model to load."""

    slot: int
