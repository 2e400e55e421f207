"""Every record becomes an envelope for its slot, or a dead letter with its bytes and the reason."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from core.records import MAX_RESULT_BYTES, DeadLetter
from operators.decoding import Decoder
from operators.envelope import Envelope, RecordPosition
from operators.placement import SessionAffinity

POSITION = RecordPosition("llm.requests", 3, 17)
GOOD = {
    "request_id": "r1",
    "session_id": "s1",
    "user_id": "u1",
    "max_new_tokens": 4,
    "created_at_ms": 5.0,
    "prompt": "hello",
}


BATCH_LINE = {
    "custom_id": "c1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "hello"}], "prompt_cache_key": "s1"},
}


def decoder() -> Decoder:
    return Decoder(SessionAffinity(4), ManualClock(1234.0))


def test_a_request_goes_to_the_slot_of_its_session() -> None:
    raw = json.dumps(GOOD).encode()
    decoded = decoder().decode(raw, POSITION)
    assert decoded == Envelope(SessionAffinity(4).slot_of("s1"), raw, POSITION, 1234.0)
    assert isinstance(decoded, Envelope)
    assert decoded.request.prompt == "hello"


def test_a_line_of_an_openai_batch_file_is_the_same_request_wherever_it_is_parsed() -> None:
    raw = json.dumps(BATCH_LINE).encode()
    decoded = decoder().decode(raw, POSITION)
    assert decoded == Envelope(SessionAffinity(4).slot_of("s1"), raw, POSITION, 1234.0, created_at_ms=1234.0)
    assert isinstance(decoded, Envelope)
    # A restart of the job counts the wait from its own start on, and not the age of the request.
    later = replace(decoded, decoded_at_ms=9999.0)
    assert later.request == decoded.request
    assert (later.request.request_id, later.request.created_at_ms) == ("c1", 1234.0)
    assert later.unanswered("no").record.request_id == "c1"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "no value"),
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"\xff\xfe\x00", "Invalid JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (json.dumps(GOOD | {"colour": 1}).encode(), "colour: unknown field"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "session_id"}).encode(), "session_id: missing"),
        (json.dumps(GOOD | {"max_new_tokens": -1}).encode(), "max_new_tokens"),
        (json.dumps(GOOD | {"max_new_tokens": "4"}).encode(), "max_new_tokens"),
        (json.dumps(GOOD | {"prompt": ""}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": "x" * (1 << 20)}).encode(), "bytes are more than"),
        (json.dumps(GOOD | {"temperature": float("nan")}).encode(), "temperature"),
        (json.dumps(GOOD | {"custom_id": "c1"}).encode(), "request_id: unknown field of a batch line"),
        (json.dumps(BATCH_LINE | {"body": {"tools": [{}]}}).encode(), "body.messages: missing"),
        (b'{"custom_id": "c1", ', "Invalid JSON"),
    ],
)
def test_a_bad_record_is_a_dead_letter_with_its_bytes(raw: bytes | None, reason: str) -> None:
    letter = decoder().decode(raw, POSITION)
    assert isinstance(letter, DeadLetter)
    assert reason in letter.reason
    assert "\n" not in letter.reason
    assert letter.raw == raw
    assert (letter.topic, letter.partition, letter.offset, letter.stage) == ("llm.requests", 3, 17, "decode")


@pytest.mark.parametrize(
    ("record", "request_id"),
    [
        (GOOD | {"max_new_tokens": -1}, "r1"),
        (GOOD | {"request_id": ""}, None),
        (GOOD | {"request_id": 7}, None),
        (["r1"], None),
        (BATCH_LINE | {"method": "GET"}, "c1"),
        (BATCH_LINE | {"custom_id": ["c1"]}, None),
    ],
)
def test_a_dead_letter_names_its_request_where_that_can_be_read(record: object, request_id: str | None) -> None:
    letter = decoder().decode(json.dumps(record).encode(), POSITION)
    assert isinstance(letter, DeadLetter)
    assert letter.request_id == request_id


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt_token_ids": [' + b'"",' * 300_000 + b"0]}",
        b'{"messages": [' + b"0," * 400_000 + b"0]}",
        b"{" + b",".join(b'"%d": 0' % number for number in range(90_000)) + b"}",
        b'{"' + b"n" * 1_000_000 + b'": 0}',
        b"\xff" * (5 << 20),
    ],
    ids=["token ids", "messages", "fields", "name", "length"],
)
def test_a_dead_letter_is_bounded_whatever_the_record_holds(raw: bytes) -> None:
    letter = decoder().decode(raw, POSITION)
    assert isinstance(letter, DeadLetter)
    assert len(letter.to_json()) < MAX_RESULT_BYTES
    assert letter.raw_bytes == len(raw)
    assert letter.raw is not None
    assert raw.startswith(letter.raw)


@given(st.binary(max_size=200))
def test_no_bytes_raise(raw: bytes) -> None:
    decoded = decoder().decode(raw, POSITION)
    assert isinstance(decoded, Envelope) or decoded.raw == raw
