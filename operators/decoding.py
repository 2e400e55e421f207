"""Decodes a record: it becomes an envelope for a slot, or a dead letter."""

import json

from pydantic import TypeAdapter

from core.clock import Clock
from core.errors import UserError
from core.openai_batch import may_be_batch_line, read_request
from core.records import MAX_RECORD_BYTES, DeadLetter, Identifier
from operators.delivery.deduplicator import Deduplicator
from operators.envelope import Envelope, RecordPosition
from operators.placement import PlacementPolicy

_IDENTIFIER: TypeAdapter[str] = TypeAdapter(Identifier)


class Decoder:
    """Validates records and chooses the slot of each session."""

    def __init__(self, placement: PlacementPolicy, clock: Clock, copies: Deduplicator | None = None) -> None:
        """Without `copies`, copies of requests are not detected."""
        self._placement = placement
        self._clock = clock
        self._copies = copies

    def decode(self, raw: bytes | None, position: RecordPosition) -> Envelope | DeadLetter | None:
        """Return the request in its envelope, a dead letter if the record is invalid, or None for a copy of a request.

        Never raises because of the record's content.
        """
        if raw is None:
            return _dead_letter("record: it has no value; send a JSON object", None, position)
        now_ms = self._clock.wall_ms()
        try:
            request = read_request(raw, now_ms)
        except UserError as error:
            return _dead_letter(str(error), raw, position)
        if self._copies is not None and self._copies.is_copy(request.request_id, position):
            return None
        slot = self._placement.slot_of(request.session_id)
        # The slot's process parses the record again: what was chosen here must be the same there.
        created_at_ms = now_ms if may_be_batch_line(raw) else None
        return Envelope(slot, raw, position, now_ms, created_at_ms=created_at_ms)


def _dead_letter(reason: str, raw: bytes | None, position: RecordPosition) -> DeadLetter:
    return DeadLetter.of(
        raw,
        reason=reason,
        stage="decode",
        request_id=_readable_id(raw),
        topic=position.topic,
        partition=position.partition,
        offset=position.offset,
    )


def _readable_id(raw: bytes | None) -> str | None:
    """The id of an invalid request, if it can be read, so that the sender can identify the request."""
    if raw is None or len(raw) > MAX_RECORD_BYTES:
        return None
    try:
        record = json.loads(raw)
        name = "request_id" if "request_id" in record else "custom_id"
        return _IDENTIFIER.validate_python(record[name], strict=True)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
