"""From a record's bytes to an envelope at its slot, or to a dead letter."""

from core.clock import Clock
from core.errors import UserError
from core.records import DeadLetter, Request
from operators.envelope import Envelope, Source
from operators.placement import SessionAffinity


class Decoder:
    """Validates a record and places its session."""

    def __init__(self, placement: SessionAffinity, clock: Clock) -> None:
        self._placement = placement
        self._clock = clock

    def decode(self, raw: bytes | None, source: Source) -> Envelope | DeadLetter:
        """Never raises for what a record holds: whatever is no request is a dead letter with the reason."""
        if raw is None:
            return _dead_letter("record: it has no value; send a JSON object", None, source)
        try:
            request = Request.from_json(raw)
        except UserError as error:
            return _dead_letter(str(error), raw, source)
        return Envelope(self._placement.slot_of(request.session_id), raw, source, self._clock.wall_ms())


def _dead_letter(reason: str, raw: bytes | None, source: Source) -> DeadLetter:
    return DeadLetter.of(
        raw, reason=reason, stage="decode", topic=source.topic, partition=source.partition, offset=source.offset
    )
