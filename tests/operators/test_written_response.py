"""The JSON from a slot's process is that of the response itself, with the time at which it leaves."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.records import FinishReason, Response, Sampling
from operators.envelope import WrittenResponse
from tests.experiments.experiment_samples import response

times_ms = st.floats(0.0, 1e15)
texts = st.text(st.characters(exclude_categories=()))
"""Texts with lone surrogates too, because a token may be half a character."""


def left(record: Response, at_ms: float) -> Response:
    return record.model_copy(update={"completed_at_ms": at_ms, "e2e_ms": at_ms - record.created_at_ms})


@given(texts, times_ms, times_ms)
def test_the_json_is_the_response_s_own_with_the_time_of_leaving(text: str, created_ms: float, at_ms: float) -> None:
    record = response(text=text, request_id=text, created_at_ms=created_ms, completed_at_ms=created_ms)
    written = WrittenResponse.of(record).leaving(at_ms).to_json()
    assert written.isascii()
    assert json.loads(written) == json.loads(left(record, at_ms).to_json())


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"text": 'ü 😀 雨 "}\\\x00\n'},
        {"token_ids": (), "output_tokens": 0, "finish_reason": "deadline", "ttft_ms": None, "tpot_ms": None},
        {"sampling": Sampling(temperature=0.7, seed=5, token_rules=("suppress_tokens",))},
    ],
)
def test_readers_find_the_response(fields: dict[str, object]) -> None:
    record = response(**fields)
    written = WrittenResponse.of(record)
    assert Response.model_validate_json(written.to_json()) == record
    at_ms = record.created_at_ms + 1234.5
    assert Response.model_validate_json(written.leaving(at_ms).to_json()) == left(record, at_ms)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff end"])
def test_a_lone_surrogate_stays_what_it_is(text: str) -> None:
    written = WrittenResponse.of(response(text=text)).to_json()
    assert Response.model_validate(json.loads(written)) == response(text=text)


@pytest.mark.parametrize("reason", FinishReason)
def test_what_metrics_read_is_what_the_response_says(reason: FinishReason) -> None:
    record = response(finish_reason=reason, local_tokens=64, remote_tokens=32, computed_tokens=5, output_tokens=7)
    written = WrittenResponse.of(record)
    for field in [*WrittenResponse._fields[1:], "e2e_ms"]:
        assert getattr(written, field) == getattr(record, field), field
    assert type(written.finish_reason) is FinishReason


def test_leaving_changes_nothing_of_the_one_before() -> None:
    written = WrittenResponse.of(response(created_at_ms=400.0, e2e_ms=500.0))
    later = written.leaving(1000.0)
    assert (written.completed_at_ms, written.e2e_ms) == (900.0, 500.0)
    assert (later.completed_at_ms, later.e2e_ms) == (1000.0, 600.0)
    assert later.leaving(900.0) == written


@given(texts)
def test_it_crosses_to_another_process(text: str) -> None:
    written = WrittenResponse.of(response(text=text))
    again = pickle.loads(pickle.dumps(written, pickle.HIGHEST_PROTOCOL))
    assert (type(again), again) == (WrittenResponse, written)
    assert again.to_json() == written.to_json()
