"""The rows that operators exchange, and those that they write to topics (strings `key` and `value`)."""

import pickle
from typing import Any

from pyflink.common import Row, Types
from pyflink.datastream import OutputTag

from core.records import DeadLetter
from operators.delivery.journal import TopicRecord
from operators.envelope import Answer, Envelope, WarmUp
from operators.envelope_state import from_plain, to_state

KEY_VALUE = Types.ROW_NAMED(["key", "value"], [Types.STRING(), Types.STRING()])
STORED = Types.PRIMITIVE_ARRAY(Types.BYTE())
"""The type of envelopes in state, as `to_state` packs them."""
KEYED = Types.ROW_NAMED(["key", "element"], [Types.INT(), STORED])
"""Rows from decode to inference: the key that leads to the slot, and an element as `element_row` packs it."""
DEAD_LETTERS = OutputTag("dead-letters", KEY_VALUE)
READY = OutputTag("ready", KEY_VALUE)
USER_ERRORS = OutputTag("user-errors", Types.STRING())
"""Each line on this output ends the job: see `pipelines.user_errors`."""
WARM_UP = -1
"""The partition of a row that warms a slot up. The index of the slot is in place of the offset."""


def element_row(key: int, element: Envelope | WarmUp) -> Row:
    return Row(key, pickle.dumps(element.slot) if isinstance(element, WarmUp) else to_state(element))


def element_of(packed: bytes) -> Envelope | WarmUp:
    """Unpack what `element_row` packed."""
    plain = pickle.loads(packed)
    return WarmUp(plain) if isinstance(plain, int) else from_plain(plain)


def answer_row(answer: Answer) -> Any:
    record = answer.record
    if isinstance(record, DeadLetter):
        return DEAD_LETTERS, dead_letter_row(record)
    return Row(record.request_id, record.to_json())


def dead_letter_row(letter: DeadLetter) -> Row:
    place = f"{letter.topic}-{letter.partition}-{letter.offset}"
    return Row(letter.request_id or place, letter.to_json())


def written_row(record: TopicRecord, dead_letters_topic: str) -> Any:
    """A record that was written before, byte for byte."""
    row = Row((record.key or b"").decode(), (record.value or b"").decode())
    return (DEAD_LETTERS, row) if record.partition.topic == dead_letters_topic else row
