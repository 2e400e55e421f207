"""Stores envelopes in Flink's state as pickled tuples of plain values that begin with a version.

A savepoint outlives the release that wrote it. An instance of a class can only be read while the class keeps its
module, its name and its fields. Release 0.1.0 did store instances. They are still read, so `operators.envelope` must
keep the names `Envelope` and `Source`.

The tuples are pickled here because Flink's own type for objects uses cloudpickle, which is ten times as slow. Bytes
from either can be read.
"""

import pickle
from typing import Any

from core.errors import UserError
from operators.envelope import Envelope, RecordPosition

VERSION = 2
"""Increased with each change of the tuple. `from_plain` must be able to read all earlier versions."""


def to_state(envelope: Envelope) -> bytes:
    """Pickles the tuple `(1, slot, raw, topic, partition, offset, decoded_at_ms, attempts)`.

    If the envelope has a `created_at_ms`, this follows as the last field, and the version is 2.
    """
    position = envelope.position
    place = (position.topic, position.partition, position.offset)
    plain = (envelope.slot, envelope.raw, *place, envelope.decoded_at_ms, envelope.attempts)
    versioned = (1, *plain) if envelope.created_at_ms is None else (2, *plain, envelope.created_at_ms)
    return pickle.dumps(versioned, pickle.HIGHEST_PROTOCOL)


def from_state(stored: bytes) -> Envelope:
    """Read an envelope that this release or an earlier one stored. Raises `UserError` for one of a later release."""
    return from_plain(pickle.loads(stored))


def from_plain(value: Any) -> Envelope:
    """The same for the unpickled value: a versioned tuple, or an instance that release 0.1.0 stored."""
    if isinstance(value, Envelope):
        # Unpickling sets the fields that release 0.1.0 had, and calls no constructor.
        stored = dict(vars(value))
        return Envelope(position=RecordPosition(**vars(stored.pop("source"))), **stored)
    version, *fields = value
    if version > VERSION:
        raise UserError(
            f"savepoint: it holds requests in version {version}, and this release reads up to {VERSION}; start the job "
            "with the release that wrote it, or a later one"
        )
    slot, raw, topic, partition, offset, *rest = fields
    return Envelope(slot, raw, RecordPosition(topic, partition, offset), *rest)
