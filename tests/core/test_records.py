"""The records in Kafka: which are accepted, which are refused with which line, and round trips."""

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.records import (
    MAX_RECORD_BYTES,
    MAX_RESULT_BYTES,
    RECORD_OVERHEAD_BYTES,
    Choice,
    DeadLetter,
    FinishReason,
    Request,
    Response,
    Sampling,
)

REQUEST = {
    "request_id": "r1",
    "session_id": "s1",
    "user_id": "u1",
    "max_new_tokens": 4,
    "created_at_ms": 1000.5,
    "prompt": "hello",
}
RESPONSE = {
    "request_id": "r1",
    "session_id": "s1",
    "user_id": "u1",
    "text": "hi",
    "token_ids": (1, 2),
    "finish_reason": FinishReason.LENGTH,
    "slot": 0,
    "device": "cpu",
    "engine": "pool",
    "model": "m",
    "batch_id": "b",
    "batch_size": 1,
    "prompt_tokens": 10,
    "local_tokens": 4,
    "remote_tokens": 3,
    "computed_tokens": 3,
    "output_tokens": 2,
    "created_at_ms": 0.0,
    "completed_at_ms": 5.0,
    "wait_ms": 1.0,
    "ttft_ms": 2.0,
    "tpot_ms": 3.0,
    "inference_ms": 4.0,
    "e2e_ms": 5.0,
    "cache_capacity_chunks": 8,
    "cache_used_chunks": 2,
    "chunk_bytes": 1024,
}


def request_json(*without: str, **fields: Any) -> str:
    return json.dumps({name: value for name, value in {**REQUEST, **fields}.items() if name not in without})


def refusal(raw: bytes | str) -> str:
    with pytest.raises(UserError) as caught:
        Request.from_json(raw)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_request_is_read_as_it_was_written() -> None:
    request = Request.from_json(request_json(temperature=0.5, seed=7, deadline_ms=100, priority=-2, cache_salt="t"))
    assert request.prompt == "hello"
    assert (request.temperature, request.seed, request.deadline_ms) == (0.5, 7, 100.0)
    assert (request.priority, request.cache_salt, request.model) == (-2, "t", None)
    assert Request.from_json(request.to_json()) == request
    assert Request.from_json(request.to_json().encode()) == request


@pytest.mark.parametrize("seconds", [1_000_000_000, 1_767_225_600, 1_767_225_600.25])
def test_a_time_in_seconds_is_told_from_one_in_milliseconds(seconds: float) -> None:
    line = refusal(request_json(created_at_ms=seconds))
    assert line == f"created_at_ms: {seconds:.0f} is a Unix time in seconds; give milliseconds"
    assert Request.from_json(request_json(created_at_ms=1000 * seconds)).created_at_ms == 1000 * seconds


def test_what_is_left_out_has_its_default() -> None:
    request = Request.from_json(request_json())
    assert (request.temperature, request.seed, request.deadline_ms, request.priority) == (None, None, None, 0)
    assert json.loads(request.to_json()) == REQUEST


prompts = st.one_of(
    st.fixed_dictionaries({"prompt": st.text(min_size=1)}),
    st.fixed_dictionaries({"prompt_token_ids": st.lists(st.integers(0, 2**32 - 1), min_size=1).map(tuple)}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}),
                min_size=1,
            ).map(tuple)
        }
    ),
)


@given(
    prompt=prompts,
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 100),
            "seed": st.integers(0, 2**63 - 1),
            "deadline_ms": st.floats(1e-3, 1e12),
            "priority": st.integers(-1000, 1000),
            "cache_salt": st.text(max_size=256),
        },
    ),
)
def test_any_request_survives_the_wire(prompt: dict[str, Any], options: dict[str, Any]) -> None:
    base = {name: value for name, value in REQUEST.items() if name != "prompt"}
    request = Request.model_validate({**base, **prompt, **options})
    assert Request.from_json(request.to_json()) == request


def test_unknown_fields_are_named() -> None:
    line = refusal(request_json(max_tokens=3, temprature=1.0))
    assert "max_tokens: unknown field" in line
    assert "temprature: unknown field" in line


@pytest.mark.parametrize("field", ["request_id", "session_id", "user_id", "max_new_tokens", "created_at_ms"])
def test_a_missing_field_is_named(field: str) -> None:
    assert refusal(request_json(field)) == f"{field}: missing; add it"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", 7),
        ("session_id", "x" * 257),
        ("user_id", None),
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "3"),
        ("max_new_tokens", True),
        ("created_at_ms", -1),
        ("created_at_ms", "now"),
        ("created_at_ms", math.nan),
        ("created_at_ms", math.inf),
        ("prompt", 3),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("deadline_ms", 0),
        ("deadline_ms", -math.inf),
        ("priority", 1001),
        ("priority", 0.5),
        ("cache_salt", "x" * 257),
        ("model", ""),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(field: str, value: Any) -> None:
    assert refusal(request_json(**{field: value})).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ({"prompt_token_ids": [1, -1]}, "prompt_token_ids.1"),
        ({"prompt_token_ids": [2**32]}, "prompt_token_ids.0"),
        ({"prompt_token_ids": [1.5]}, "prompt_token_ids.0"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: missing"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages.0.name: unknown field"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_a_bad_prompt_is_refused_by_its_place(form: dict[str, Any], place: str) -> None:
    assert refusal(request_json("prompt" if "prompt" not in form else "", **form)).startswith(place)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"prompt": None}, "found none"),
        ({"prompt_token_ids": [1]}, "found prompt and prompt_token_ids"),
        ({"messages": [{"role": "user", "content": "x"}]}, "found prompt and messages"),
    ],
)
def test_exactly_one_prompt(fields: dict[str, Any], found: str) -> None:
    line = refusal(request_json(**fields))
    assert "exactly one of prompt, messages, prompt_token_ids" in line
    assert found in line


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"17",
        b"\xff\xfe\x00",
        b'{"request_id":"\xff"}',
        b'{"prompt":"\\ud800"}',
        request_json().encode() + b"x",
        b"[" * 5000 + b"]" * 5000,
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
        "{\ud800}",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_json_object_is_refused(raw: bytes | str) -> None:
    assert refusal(raw).startswith("record: ")


def test_a_record_above_the_limit_is_refused_before_it_is_parsed() -> None:
    base = len(request_json(prompt=""))
    largest = request_json(prompt="x" * (MAX_RECORD_BYTES - base)).encode()
    assert len(largest) == MAX_RECORD_BYTES
    assert Request.from_json(largest).prompt is not None
    assert "shorten it" in refusal(largest + b" ")
    assert "shorten it" in refusal(json.dumps({**REQUEST, "prompt": "ä" * (MAX_RECORD_BYTES // 2)}, ensure_ascii=False))


@given(raw=st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_user_error(raw: bytes) -> None:
    with suppress(UserError):
        Request.from_json(raw)


def test_a_response_survives_the_wire() -> None:
    response = Response(**RESPONSE)
    assert Response.model_validate_json(response.to_json()) == response


def test_a_response_says_how_it_was_sampled_and_an_old_one_does_not() -> None:
    sampling = Sampling(temperature=0.7, top_k=20, seed=5, token_rules=("suppress_tokens",))
    said = Response(**RESPONSE, sampling=sampling)
    assert json.loads(said.to_json())["sampling"] == {
        "temperature": 0.7,
        "top_k": 20,
        "seed": 5,
        "token_rules": ["suppress_tokens"],
    }
    assert Response.model_validate_json(said.to_json()) == said
    assert json.loads(Response(**RESPONSE, sampling=Sampling()).to_json())["sampling"] == {}
    assert Response(**RESPONSE).sampling is None


@pytest.mark.parametrize("field", ["prompt_tokens", "local_tokens", "remote_tokens", "computed_tokens"])
def test_prompt_tokens_must_add_up(field: str) -> None:
    with pytest.raises(ValueError, match="prompt_tokens must equal"):
        Response(**{**RESPONSE, field: RESPONSE[field] + 1})


@pytest.mark.parametrize("output_tokens", [1, 3])
def test_output_tokens_are_those_listed(output_tokens: int) -> None:
    with pytest.raises(ValueError, match="output_tokens must equal"):
        Response(**{**RESPONSE, "output_tokens": output_tokens})


@pytest.mark.parametrize(
    ("field", "value"), [("local_tokens", -1), ("wait_ms", math.nan), ("e2e_ms", math.inf), ("finish_reason", "tired")]
)
def test_a_response_without_meaning_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Response(**{**RESPONSE, field: value})


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff end", "ü 😀", "\x00\n"])
def test_a_response_is_written_in_ascii(text: str) -> None:
    written = Response(**{**RESPONSE, "text": text}).to_json()
    assert written.isascii()
    assert "\n" not in written
    assert json.loads(written)["text"] == text


@pytest.mark.parametrize("text", ["x", "\ud800"])
def test_a_response_is_written_without_what_it_is_told_to_leave_out(text: str) -> None:
    response = Response(**{**RESPONSE, "text": text})
    written, whole = (json.loads(response.to_json(without)) for without in ({"e2e_ms", "text"}, set()))
    only_if_asked = {"logprobs", "prompt_logprobs", "further_choices"}
    assert list(whole) == [name for name in Response.model_fields if name not in only_if_asked]
    assert written == {name: value for name, value in whole.items() if name not in {"e2e_ms", "text"}}


@given(text=st.text(), e2e_ms=st.floats(-1e15, 1e15), sampled=st.booleans())
def test_a_lone_surrogate_changes_nothing_else_of_what_is_written(text: str, e2e_ms: float, sampled: bool) -> None:
    sampling = Sampling(temperature=0.7, seed=5) if sampled else None
    plain, lone = (
        Response(**{**RESPONSE, "text": text + end, "e2e_ms": e2e_ms}, sampling=sampling) for end in ("", "\udfff")
    )
    assert json.loads(lone.to_json()) == json.loads(plain.to_json()) | {"text": text + "\udfff"}


def test_an_answer_is_too_long_exactly_if_its_topic_could_refuse_it() -> None:
    def answer(tokens: int, text: str) -> Response:
        return Response(**{**RESPONSE, "text": text, "token_ids": (1,) * tokens, "output_tokens": tokens})

    assert not answer(100_000, "x" * 400_000).is_too_long
    # A character may take six bytes in the record, so this text might be too long; it is not.
    assert not answer(100_000, "雨" * 400_000).is_too_long
    for long in (answer(100_000, "雨" * 700_000), answer(1_000_000, "😀" * 200_000)):
        assert len(long.to_json()) > MAX_RESULT_BYTES - (40 << 10)
        assert long.is_too_long
    # All that it may hold beside a text that nearly fills the record.
    full = {
        "text": "\U0001f600" * ((MAX_RESULT_BYTES - RECORD_OVERHEAD_BYTES - 100) // 12),
        "sampling": Sampling(logit_bias={100_000 + token: -1.2345678901234567 for token in range(1024)}),
        "further_choices": (Choice(text="", token_ids=(), finish_reason=FinishReason.DEADLINE),) * 127,
    }
    assert Response(**{**RESPONSE, **full}).is_too_long


@given(raw=st.none() | st.binary())
def test_a_dead_letter_gives_back_its_bytes(raw: bytes | None) -> None:
    letter = DeadLetter.of(raw, reason="no JSON", stage="decode", topic="t", partition=3, offset=9)
    again = DeadLetter.model_validate_json(letter.to_json())
    assert again == letter
    assert again.raw == raw
    assert (again.topic, again.partition, again.offset, again.request_id) == ("t", 3, 9, None)


def test_a_dead_letter_takes_any_reason() -> None:
    letter = DeadLetter.of(b"x", reason="\ud800 ü", stage="inference", topic="t", partition=0, offset=0)
    assert letter.to_json().isascii()
    assert json.loads(letter.to_json())["reason"] == "\ud800 ü"


@pytest.mark.parametrize(
    "field",
    [
        "messages", "prompt_token_ids", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logit_bias", "seed", "min_new_tokens", "stop", "stop_token_ids",
        "ignore_eos", "deadline_ms", "priority", "cache_salt", "model",
    ],
)  # fmt: skip
def test_null_is_not_given(field: str) -> None:
    assert Request.from_json(request_json(**{field: None})) == Request.from_json(request_json())


def test_sampling_parameters_are_read_as_they_were_written() -> None:
    given = {
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "min_new_tokens": 2,
        "ignore_eos": True,
    }
    request = Request.from_json(request_json(**given, logit_bias={"5": 3, "250": -100.0}, stop_token_ids=[3, 4]))
    assert {name: getattr(request, name) for name in given} == given
    assert (request.logit_bias, request.stop_token_ids) == ({5: 3.0, 250: -100.0}, (3, 4))
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize(("given", "stop"), [("\n", ("\n",)), (["a", "bc"], ("a", "bc")), ([], ())])
def test_stop_is_a_string_or_several(given: Any, stop: tuple[str, ...]) -> None:
    assert Request.from_json(request_json(stop=given)).stop == stop


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"stop": ""}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"priority": 1.5}, "priority"),
        ({"cache_salt": 7}, "cache_salt"),
    ],
)
def test_a_bad_parameter_is_named(fields: dict[str, Any], place: str) -> None:
    line = refusal(request_json(**fields))
    assert line.startswith(f"{place}: ")
    assert ";" not in line


def test_more_tokens_asked_for_than_allowed_is_refused() -> None:
    assert "min_new_tokens is above max_new_tokens (5 > 4)" in refusal(request_json(min_new_tokens=5))


MESSAGES = [{"role": "developer", "content": "x"}, {"role": "tool", "content": "{}"}, {"role": "user", "content": "Hi"}]


def test_roles_of_agents_and_parts_of_text_are_taken() -> None:
    request = Request.from_json(request_json("prompt", messages=MESSAGES))
    assert request.messages is not None
    assert [message.role for message in request.messages] == ["developer", "tool", "user"]
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    request = Request.from_json(request_json("prompt", messages=[{"role": "user", "content": parts}]))
    assert request.messages is not None
    assert request.messages[0].content == "Hi\nthere"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "part 0 is not of the form"),
        ([{"type": "text", "text": "x"}, "y"], "part 1 is not of the form"),
        ([{"type": "text", "text": 5}], "the text of part 0 is not a string"),
        ([], "no part in it; send some text"),
        (None, "Input should be a valid string"),
    ],
)
def test_what_is_no_text_is_named(content: Any, fault: str) -> None:
    line = refusal(request_json("prompt", messages=[{"role": "user", "content": content}]))
    assert line.startswith(f"messages.0.content: {fault}")
    assert line.count("messages") == 1


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("messages", [{"role": "User", "content": "x"}, {"role": "user", "content": "Hi"}], "messages.0.role"),
        ("prompt_token_ids", [-1, 5], "prompt_token_ids.0"),
    ],
)
def test_a_bad_first_item_does_not_make_a_list_too_short(field: str, value: Any, place: str) -> None:
    line = refusal(request_json("prompt", **{field: value}))
    assert line.startswith(f"{place}: ")
    assert "at least" not in line
    assert "at least 1 item" in refusal(request_json("prompt", **{field: []}))


# Formats of answers.


@pytest.mark.parametrize(
    "given",
    [
        {"type": "text"},
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "object", "x": [1, None]}, "name": "n", "strict": True},
        },
        {"type": "regex", "regex": "a+"},
        {"type": "choice", "choice": ["a", "b"]},
    ],
)
def test_a_format_comes_back_as_it_was_given(given: dict[str, Any]) -> None:
    request = Request.from_json(request_json(response_format=given))
    assert json.loads(request.to_json())["response_format"] == given
    assert Request.from_json(request.to_json()) == request
    assert Request.from_json(request_json(response_format=None)).response_format is None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"type": "grammar"}, "response_format.type: Input should be 'text', 'json_object', 'json_schema', 'regex' or"),
        ({}, "response_format.type: missing; add it"),
        ("json_object", "response_format: Input should be an object"),
        ({"type": "regex"}, "response_format: type regex needs the field regex"),
        (
            {"type": "regex", "regex": "a", "choice": ["a"]},
            "response_format: type regex does not have the field choice",
        ),
        ({"type": "json_object", "schema": {}}, "response_format.schema: unknown field; remove it"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema: missing; add it"),
        (
            {"type": "json_schema", "json_schema": {"schema": "{}"}},
            "response_format.json_schema.schema: Input should be an object",
        ),
        ({"type": "choice", "choice": ["a", ""]}, "response_format.choice.1: String should have at least 1 character"),
        ({"type": "choice", "choice": []}, "response_format.choice: Tuple should have at least 1 item"),
        ({"type": "choice", "choice": ["a"] * 1025}, "response_format.choice: Tuple should have at most 1024 items"),
    ],
)
def test_a_format_that_is_none_is_refused_by_name(given: Any, line: str) -> None:
    assert refusal(request_json(response_format=given)).startswith(line)


def test_an_answer_in_a_format_needs_its_end_tokens() -> None:
    line = refusal(request_json(response_format={"type": "json_object"}, ignore_eos=True))
    assert line.startswith("record: ignore_eos: an answer in a response_format ends with an end token")
    assert Request.from_json(request_json(response_format={"type": "text"}, ignore_eos=True)).ignore_eos
