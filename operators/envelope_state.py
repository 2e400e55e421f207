"""The form in which an envelope stands in Flink's state: a versioned tuple of plain values, pickled.

A savepoint outlives the release that wrote it. An instance of a class could only be read while the class keeps its
module, its name and its fields. Release 0.1.0 did store instances. They are still read, so `operators.envelope` must
keep the names `Envelope` and `Source`.

It is pickled here: Flink's own type for objects takes them through cloudpickle, at ten times the cost. What either has
written can be read.
"""

import pickle
from typing import Any

from core.errors import UserError
from operators.envelope import Envelope, RecordPosition

VERSION = 1
"""Increased with each change of the tuple. `from_plain` must go on to read all versions before."""


def to_state(envelope: Envelope) -> bytes:
    """Pickles the tuple `(version, slot, raw, topic, partition, offset, decoded_at_ms, attempts)`."""
    position = envelope.position
    place = (position.topic, position.partition, position.offset)
    plain = (VERSION, envelope.slot, envelope.raw, *place, envelope.decoded_at_ms, envelope.attempts)
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def from_state(stored: bytes) -> Envelope:
    """The envelope that this release, or one before it, stored. Raises `UserError` for what a later one stored."""
    return from_plain(pickle.loads(stored))


def from_plain(value: Any) -> Envelope:
    """The same, of the tuple itself, or the instance that release 0.1.0 stored."""
    if isinstance(value, Envelope):
        # Unpickling sets the fields that release 0.1.0 had, and calls no constructor.
        fields = dict(vars(value))
        return Envelope(position=RecordPosition(**vars(fields.pop("source"))), **fields)
    version, *fields = value
    if version != VERSION:
        raise UserError(
            f"savepoint: it holds requests in version {version}, and this release reads up to {VERSION}; start the job "
            "with the release that wrote it, or a later one"
        )
    slot, raw, topic, partition, offset, decoded_at_ms, attempts = fields
    return Envelope(slot, raw, RecordPosition(topic, partition, offset), decoded_at_ms, attempts)
