"""From a request to its prompt tokens, and each reason to refuse it."""

import dataclasses
from copy import deepcopy
from typing import Any

import pytest
from engine_helpers import MAX_LEN, ask

from core.errors import UserError
from core.records import Message, Request
from inference_service.model import LoadedModel
from inference_service.prompts import prompt_tokens


def said(**fields: Any) -> Request:
    return Request(request_id="r", session_id="s", user_id="u", max_new_tokens=1, created_at_ms=0.0, **fields)


def bytes_of(model: LoadedModel, tokens: list[int]) -> bytes:
    return model.tokenizer.decode(tokens).encode()


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)  # type: ignore[arg-type]


def refusal(request: Request, model: LoadedModel) -> str:
    with pytest.raises(UserError) as caught:
        prompt_tokens(request, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def other_tokenizer(qwen2: LoadedModel) -> LoadedModel:
    """The model with another tokenizer, which a test may change."""
    return dataclasses.replace(qwen2, tokenizer=deepcopy(qwen2.tokenizer))


def test_ids_are_taken_as_they_are(qwen2: LoadedModel) -> None:
    assert prompt_tokens(ask("r", [5, 257, 0]), qwen2) == [5, 257, 0]


def test_a_prompt_is_its_bytes(qwen2: LoadedModel) -> None:
    text = "naïve 😀 e\u0301"
    tokens = prompt_tokens(said(prompt=text), qwen2)
    assert len(tokens) == len(text.encode())
    assert bytes_of(qwen2, tokens) == text.encode()


def test_messages_pass_through_the_chat_template(qwen2: LoadedModel) -> None:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    tokens = prompt_tokens(said(messages=messages), qwen2)
    assert bytes_of(qwen2, tokens) == b"System: Be brief.\nUser: Hi\nAssistant:"


def test_messages_without_a_chat_template_are_refused(other_tokenizer: LoadedModel) -> None:
    other_tokenizer.tokenizer.chat_template = None
    line = refusal(said(messages=(Message(role="user", content="Hi"),)), other_tokenizer)
    assert line == "messages: the tokenizer of 'qwen2' has no chat template; send prompt instead"


def test_messages_that_the_chat_template_refuses_are_the_users_error(other_tokenizer: LoadedModel) -> None:
    other_tokenizer.tokenizer.chat_template = "{{ raise_exception('System role\nnot supported') }}"
    line = refusal(said(messages=(Message(role="system", content="Hi"),)), other_tokenizer)
    assert line == "messages: the chat template of 'qwen2' does not take them: System role not supported"


def test_a_wrong_model_is_refused(qwen2: LoadedModel) -> None:
    assert prompt_tokens(said(prompt="a", model="qwen2"), qwen2) != []
    assert refusal(said(prompt="a", model="qwen3"), qwen2) == "model: this job serves 'qwen2', not 'qwen3'"


def test_the_longest_prompt_leaves_room_for_one_token(qwen2: LoadedModel) -> None:
    assert len(prompt_tokens(said(prompt="x" * (MAX_LEN - 1)), qwen2)) == MAX_LEN - 1
    line = refusal(said(prompt="x" * MAX_LEN), qwen2)
    assert line == (
        "prompt: 64 tokens leave no room for an answer in the 64 that the engine holds; "
        "shorten it or raise --max-model-len"
    )
    assert refusal(ask("r", [1] * 65), qwen2).startswith("prompt_token_ids: 65 tokens leave no room")


def test_a_limit_of_the_models_own_is_not_blamed_on_an_option(qwen2: LoadedModel) -> None:
    limited = dataclasses.replace(qwen2, own_limit="max_position_embeddings")
    assert refusal(ask("r", [1] * 64), limited) == (
        "prompt_token_ids: 64 tokens leave no room for an answer in the 64 that the model itself holds "
        "(max_position_embeddings); shorten it"
    )


def test_tokens_outside_the_vocabulary_are_refused(other_tokenizer: LoadedModel) -> None:
    assert refusal(ask("r", [3, 258, 2]), other_tokenizer) == (
        "prompt_token_ids: token 258 is outside the vocabulary of 258 tokens"
    )
    other_tokenizer.tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    allowing = dataclasses.replace(other_tokenizer, allow_special_tokens=True)
    assert refusal(said(prompt="a<|new|>"), allowing).startswith("prompt: token 258 is outside")
    assert refusal(said(messages=chat(("user", "<|new|>"))), allowing).startswith("messages: token 258 is outside")
    assert bytes_of(other_tokenizer, prompt_tokens(said(prompt="a<|new|>"), other_tokenizer)) == b"a<|new|>"


def test_a_prompt_without_a_token_is_refused(other_tokenizer: LoadedModel) -> None:
    other_tokenizer.tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    line = refusal(said(messages=chat(("user", " "))), other_tokenizer)
    assert line == "messages: no token in it; send some text"
