"""The rows from decode arrive at the slot's operator unchanged."""

import pickle
import pickletools
from dataclasses import MISSING, fields, replace

import pytest

from operators.envelope import Answer, Envelope, RecordPosition, WarmUp, WrittenResponse
from operators.flink.rows import DEAD_LETTERS, answer_row, element_of, element_row
from tests.experiments.experiment_samples import response
from tests.operators.slot_harness import packed
from tests.operators.stand_in_slot import envelope, letter

FULL = Envelope(
    2, b"\x00\xff r\xc3\xa4w", RecordPosition("t", 3, 1 << 40), 1_800_000_000_000.5, attempts=4, created_at_ms=1.5
)


@pytest.mark.parametrize("element", [FULL, envelope(1), replace(envelope(1), raw=b""), WarmUp(0), WarmUp(5)])
@pytest.mark.parametrize("key", [0, 7, 1 << 30])
def test_an_element_comes_back_whole(element: Envelope | WarmUp, key: int) -> None:
    again = element_of(packed(element, key))
    assert (type(again), again) == (type(element), element)


def test_a_row_names_the_key_that_leads_to_the_slot() -> None:
    for element in (FULL, WarmUp(2)):
        assert element_row(11, element)[0] == 11


@pytest.mark.parametrize("element", [FULL, WarmUp(5)])
def test_no_class_is_packed(element: Envelope | WarmUp) -> None:
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(element_row(0, element)[1])}
    assert opcodes.isdisjoint({"GLOBAL", "STACK_GLOBAL"})


@pytest.mark.parametrize("value", [FULL, FULL.position])
def test_no_field_stays_behind_on_the_way_to_the_slot_s_process(value: Envelope | RecordPosition) -> None:
    assert all(getattr(value, field.name) != field.default for field in fields(value) if field.default is not MISSING)
    again = pickle.loads(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    assert (type(again), again) == (type(value), value)


def test_a_response_leaves_as_its_json_under_its_id() -> None:
    written = WrittenResponse.of(response(request_id="good"))
    row = answer_row(Answer(FULL.position, written))
    assert tuple(row) == ("good", written.to_json())


def test_a_dead_letter_leaves_to_the_side() -> None:
    record = letter(envelope(3))
    tag, row = answer_row(Answer(envelope(3).position, record))
    assert (tag, tuple(row)) == (DEAD_LETTERS, ("t-0-3", record.to_json()))
