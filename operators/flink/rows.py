"""The rows that enter and leave the operators: strings `key` and `value`, for the topic that their stream leads to."""

from typing import Any

from pyflink.common import Row, Types
from pyflink.datastream import OutputTag

from core.records import DeadLetter, Response
from operators.delivery.journal import Record
from operators.envelope import Answer

KEY_VALUE = Types.ROW_NAMED(["key", "value"], [Types.STRING(), Types.STRING()])
DEAD_LETTERS = OutputTag("dead-letters", KEY_VALUE)
READY = OutputTag("ready", KEY_VALUE)
USER_ERRORS = OutputTag("user-errors", Types.STRING())
"""Lines of which each ends the job: `pipelines.user_errors`."""
WARM_UP = -1
"""The partition of a row that calls a slot to warm up; the slot stands in place of the offset."""


def answer_row(answer: Answer) -> Any:
    record = answer.record
    if isinstance(record, Response):
        return Row(record.request_id, record.to_json())
    return DEAD_LETTERS, dead_letter_row(record)


def dead_letter_row(letter: DeadLetter) -> Row:
    place = f"{letter.topic}-{letter.partition}-{letter.offset}"
    return Row(letter.request_id or place, letter.to_json())


def written_row(record: Record, dead_letters_topic: str) -> Any:
    """What was written before, byte for byte."""
    row = Row((record.key or b"").decode(), (record.value or b"").decode())
    return (DEAD_LETTERS, row) if record.partition.topic == dead_letters_topic else row
