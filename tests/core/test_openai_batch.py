"""A line of an OpenAI batch file becomes the request that it means, or is refused by a line that names its field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.openai_batch import CHAT, COMPLETIONS, may_be_batch_line, read_request
from core.records import MAX_NEW_TOKENS, MAX_RECORD_BYTES, Request

NOW_MS = 1_800_000_000_000.0
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ORDINARY = {
    "request_id": "r1",
    "session_id": "s1",
    "user_id": "u1",
    "max_new_tokens": 4,
    "created_at_ms": NOW_MS,
    "prompt": "hello",
}


def batch_line(body: Any, url: str = CHAT, **fields: Any) -> bytes:
    return json.dumps({"custom_id": "c1", "method": "POST", "url": url, "body": body} | fields).encode()


def chat(**body: Any) -> Request:
    return read_request(batch_line({"messages": MESSAGES} | body), NOW_MS)


def completion(**body: Any) -> Request:
    return read_request(batch_line({"prompt": "hello"} | body, COMPLETIONS), NOW_MS)


def test_a_chat_line_with_every_field_is_the_request_that_it_means() -> None:
    body = {
        "model": "m",
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "logit_bias": {"17": -100},
        "seed": 3,
        "n": 2,
        "prompt_logprobs": 1,
        "stop": ["\n", "END"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": True,
        "top_logprobs": 4,
        "user": "u1",
        "prompt_cache_key": "s1",
    }
    expected = {
        "request_id": "c1",
        "session_id": "s1",
        "user_id": "u1",
        "created_at_ms": NOW_MS,
        "messages": MESSAGES,
        "max_new_tokens": 7,
        "min_new_tokens": 2,
        "logprobs": 4,
    }
    same = set(body) & set(Request.model_fields) - {"logprobs"}
    assert chat(**body) == Request.from_json(json.dumps(expected | {name: body[name] for name in same}))


def test_a_format_is_the_one_of_a_request() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}
    ordinary = Request.from_json(json.dumps(ORDINARY | {"response_format": wanted}))
    assert chat(response_format=wanted).response_format == ordinary.response_format is not None


def test_a_completion_line_is_the_request_that_it_means() -> None:
    found = completion(max_tokens=9, logprobs=2, min_tokens=1, stop="x")
    assert (found.request_id, found.prompt, found.messages) == ("c1", "hello", None)
    assert (found.max_new_tokens, found.logprobs, found.min_new_tokens, found.stop) == (9, 2, 1, ("x",))


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [("a", "a", None), (["a"], "a", None), ([1, 2], None, (1, 2)), ([[1, 2]], None, (1, 2))],
)
def test_a_prompt_is_a_text_or_token_ids(prompt: Any, text: str | None, token_ids: tuple[int, ...] | None) -> None:
    found = completion(prompt=prompt)
    assert (found.prompt, found.prompt_token_ids) == (text, token_ids)


def test_without_a_limit_a_chat_ends_by_itself_and_a_completion_after_the_default_of_openai() -> None:
    assert chat().max_new_tokens == MAX_NEW_TOKENS
    assert completion().max_new_tokens == 16
    assert chat(max_tokens=3).max_new_tokens == 3


@pytest.mark.parametrize(
    ("body", "session_id", "user_id"),
    [
        ({}, "c1", "c1"),
        ({"user": "u"}, "c1", "u"),
        ({"prompt_cache_key": "k", "safety_identifier": "i"}, "k", "i"),
        ({"prompt_cache_key": "k", "metadata": {"session_id": "s", "label": "any"}}, "s", "s"),
        ({"safety_identifier": "i", "user": "u"}, "c1", "u"),
    ],
)
def test_session_and_user_are_those_that_are_given_first(body: dict[str, Any], session_id: str, user_id: str) -> None:
    found = chat(**body)
    assert (found.session_id, found.user_id) == (session_id, user_id)


def test_the_time_of_creation_may_be_given() -> None:
    assert chat().created_at_ms == NOW_MS
    assert chat(metadata={"created_at_ms": "1700000000000.5"}).created_at_ms == 1_700_000_000_000.5


@pytest.mark.parametrize(("logprobs", "top", "found"), [(True, None, 0), (True, 5, 5), (False, None, None)])
def test_chat_says_by_a_flag_whether_it_wants_log_probabilities(
    logprobs: bool, top: int | None, found: int | None
) -> None:
    assert chat(logprobs=logprobs, top_logprobs=top).logprobs == found


def test_null_is_not_given() -> None:
    fields = ["temperature", "stop", "tools", "stream", "user", "metadata", "max_tokens", "logprobs", "colour", "n"]
    assert chat(**dict.fromkeys(fields)) == chat()


def test_a_value_that_changes_nothing_is_accepted_of_what_is_not_supported() -> None:
    assert chat(stream=False, tools=[], tool_choice="none", store=False, top_k=-1) == chat(top_k=0)


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (
            batch_line({"messages": MESSAGES, "tools": [{"type": "function"}]}),
            "body.tools: is not supported; remove it",
        ),
        (batch_line({"messages": MESSAGES, "stream": True}), "body.stream: is not supported; remove it"),
        (batch_line({"prompt": "a", "best_of": 3}, COMPLETIONS), "body.best_of: is not supported; remove it"),
        (batch_line({"messages": MESSAGES, "colour": 1}), "body.colour: unknown field; remove it"),
        (batch_line({"messages": MESSAGES, "a\nb": 1}), "body.a b: unknown field; remove it"),
        (batch_line({"messages": MESSAGES, "prompt": "a"}), "body.prompt: unknown field; remove it"),
        (batch_line({"prompt": "a", "messages": MESSAGES}, COMPLETIONS), "body.messages: unknown field; remove it"),
        (batch_line({"messages": MESSAGES}, colour=1), "colour: unknown field of a batch line; remove it"),
        (batch_line({}), "body.messages: missing; add it"),
        (batch_line({}, COMPLETIONS), "body.prompt: missing; add it"),
        (
            batch_line({"prompt": ["a", "b"]}, COMPLETIONS),
            "body.prompt: holds 2 prompts; send a line for each",
        ),
        (batch_line(None), "body: is not an object; put the parameters of the request there"),
        (batch_line([]), "body: is not an object; put the parameters of the request there"),
        (batch_line({}, "/v1/embeddings"), f"url: only {CHAT} and {COMPLETIONS} are served; send it there"),
        (batch_line({}, url=["x"]), f"url: only {CHAT} and {COMPLETIONS} are served; send it there"),
        (batch_line({}, method="GET"), 'method: is not "POST"; every line of a batch is a POST'),
        (batch_line({"messages": MESSAGES, "top_logprobs": 2}), "body.top_logprobs: needs logprobs; set it to true"),
        (
            batch_line({"messages": MESSAGES, "logprobs": 2}),
            "body.logprobs: is not a boolean; give the number of alternatives as top_logprobs",
        ),
        (
            batch_line({"messages": MESSAGES, "metadata": {"created_at_ms": "today"}}),
            "body.metadata.created_at_ms: is not a number; give a Unix time in milliseconds",
        ),
        (
            batch_line({"messages": MESSAGES, "max_tokens": 2, "min_tokens": 3}),
            "record: body.min_tokens is above body.max_tokens (3 > 2)",
        ),
    ],
)
def test_a_refusal_names_the_field_and_the_fix(raw: bytes, line: str) -> None:
    with pytest.raises(UserError) as raised:
        read_request(raw, NOW_MS)
    assert str(raised.value) == line


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"temperature": -1}, "body.temperature"),
        ({"max_tokens": 0}, "body.max_tokens"),
        ({"max_completion_tokens": "4"}, "body.max_completion_tokens"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "body.messages.0.role"),
        ({"messages": "hello"}, "body.messages"),
        ({"logprobs": True, "top_logprobs": 21}, "body.top_logprobs"),
        ({"logit_bias": {"x": 1}}, "body.logit_bias"),
        ({"seed": -1}, "body.seed"),
        ({"n": 0}, "body.n"),
        ({"response_format": {"type": "xml"}}, "body.response_format"),
        ({"user": ""}, "body.user"),
        ({"user": 7}, "body.user"),
        ({"prompt_cache_key": "x" * 300}, "body.prompt_cache_key"),
        ({"metadata": {"session_id": 7}}, "body.metadata.session_id"),
        ({"metadata": {"created_at_ms": "1e400"}}, "body.metadata.created_at_ms"),
        ({"metadata": {"created_at_ms": "1700000000"}}, "body.metadata.created_at_ms"),
        ({"metadata": []}, "body.metadata"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_that_it_has_in_the_line(body: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"^{field}[.:]") as raised:
        chat(**body)
    assert "; body." not in str(raised.value)


@pytest.mark.parametrize("custom_id", ["", 7, None, "x" * 257])
def test_a_custom_id_is_an_identifier(custom_id: Any) -> None:
    with pytest.raises(UserError, match=r"^custom_id: "):
        read_request(batch_line({"messages": MESSAGES}, custom_id=custom_id), NOW_MS)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"custom_id": ',
        b'{"custom_id": "a", "body": ' + b"[" * 5000,
        b'{"custom_id": NaN}',
        b'{"custom_id": "\\ud800"}',
        b'{"custom_id": "a"}\xff',
    ],
)
def test_what_is_no_json_is_told_as_for_ordinary_records(raw: bytes) -> None:
    with pytest.raises(UserError, match=r"^record: Invalid JSON: "):
        read_request(raw, NOW_MS)


def test_a_number_that_is_not_finite_is_refused_and_not_lost() -> None:
    raw = batch_line({"messages": MESSAGES, "temperature": 17}).replace(b"17", b"1e400")
    with pytest.raises(UserError, match=r"^body\.temperature: "):
        read_request(raw, NOW_MS)


def test_a_line_is_no_longer_than_a_record_may_be() -> None:
    with pytest.raises(UserError, match=r"^record: .* bytes are more than"):
        read_request(batch_line({"messages": MESSAGES}) + b" " * MAX_RECORD_BYTES, NOW_MS)


@pytest.mark.parametrize("prompt", ["custom_id", 'my "custom_id" is', "plain"])
def test_ordinary_records_stay_what_they_are(prompt: str) -> None:
    raw = json.dumps(ORDINARY | {"prompt": prompt}).encode()
    assert read_request(raw, 0.0) == Request.from_json(raw)
    assert may_be_batch_line(raw) == (prompt == "custom_id")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "messages",
    "prompt",
    "max_tokens",
    "min_tokens",
    "top_k",
    "logprobs",
    "top_logprobs",
    "metadata",
    "stop",
    "n",
    "logit_bias",
    "response_format",
    "user",
    "prompt_cache_key",
    "tools",
    "stream",
    "seed",
    "model",
    "extra",
]


@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=6), st.sampled_from([CHAT, COMPLETIONS]))
def test_any_body_is_refused_in_one_line_or_the_same_request_each_time(body: dict[str, Any], url: str) -> None:
    valid = {"messages": MESSAGES} if url == CHAT else {"prompt": "a"}
    for one in (body, valid | body):
        raw = batch_line(one, url)
        found = outcome(raw)
        assert found == outcome(raw)
        assert isinstance(found, Request) or "\n" not in found


def outcome(raw: bytes) -> Request | str:
    try:
        return read_request(raw, NOW_MS)
    except UserError as error:
        return str(error)
