"""The rows that enter and leave the operators: strings `key` and `value`, for the topic that their stream leads to."""

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
"""In state: an envelope as `to_state` packs it."""
KEYED = Types.ROW_NAMED(["key", "element"], [Types.INT(), STORED])
"""On the way to inference: the key that leads to the slot, and an element as `element_row` packs it."""
DEAD_LETTERS = OutputTag("dead-letters", KEY_VALUE)
READY = OutputTag("ready", KEY_VALUE)
USER_ERRORS = OutputTag("user-errors", Types.STRING())
"""Lines of which each ends the job: `pipelines.user_errors`."""
WARM_UP = -1
"""The partition of a row that calls a slot to warm up; the slot stands in place of the offset."""


def element_row(key: int, element: Envelope | WarmUp) -> Row:
    return Row(key, pickle.dumps(element.slot) if isinstance(element, WarmUp) else to_state(element))


def element_of(packed: bytes) -> Envelope | WarmUp:
    """What `element_row` packed."""
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
    """What was written before, byte for byte."""
    row = Row((record.key or b"").decode(), (record.value or b"").decode())
    return (DEAD_LETTERS, row) if record.partition.topic == dead_letters_topic else row
