"""Every parameter of a request takes effect: alone, in a batch, and with reuse."""

from typing import Any

import pytest
import torch
from engine_helpers import CHUNK, EOS_ID, MemoryCache, answers, ask, make_engine, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from core.records import FinishReason, Request
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import Completion, Failure
from inference_service.detokenize import UNFINISHED, StopStrings, answer_text
from inference_service.logprobs import LEAST_LOGPROB, token_logprobs
from inference_service.model import LoadedModel

PROMPT = tokens_of(11, 19)
PARAMETERS: dict[str, Any] = {
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 1.0,
    "frequency_penalty": 0.5,
    "logit_bias": {5: 2.0, 65: -3.0},
    "min_new_tokens": 3,
}


def answer(model: LoadedModel, **fields: Any) -> Completion:
    return answers(make_engine(model).run([ask("a", PROMPT, **fields)]))["a"]


def reason(model: LoadedModel, **fields: Any) -> str:
    (failure,) = make_engine(model).run([ask("a", PROMPT, **fields)])
    assert isinstance(failure, Failure)
    return failure.reason


def test_the_answer_says_which_parameters_were_used(qwen2: LoadedModel) -> None:
    used = answer(qwen2, temperature=0.8, seed=5, **PARAMETERS).sampling
    assert {name: getattr(used, name) for name in PARAMETERS} == PARAMETERS
    assert (used.temperature, used.seed) == (0.8, 5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_parameters_give_the_same_answer_in_company_and_with_reuse(model: LoadedModel, temperature: float) -> None:
    requests: list[Request] = [
        ask(f"{name}", PROMPT, 12, temperature=temperature, seed=4, **{name: value})
        for name, value in PARAMETERS.items()
    ]
    requests.append(ask("all", PROMPT, 12, temperature=temperature, seed=4, **PARAMETERS))
    requests.append(ask("none", PROMPT, 12, temperature=temperature, seed=4))
    alone = {one.request_id: answers(make_engine(model).run([one]))[one.request_id].token_ids for one in requests}
    cache = MemoryCache(model.chunk_shape(CHUNK))
    for _ in range(2):
        found = answers(make_engine(model, cache=cache).run(requests))
        assert {name: one.token_ids for name, one in found.items()} == alone
    assert found["all"].local_tokens > 0


def test_a_bias_forbids_and_forces(qwen2: LoadedModel) -> None:
    plain = answer(qwen2).token_ids
    assert answer(qwen2, logit_bias={77: 100.0}).token_ids == (77,) * len(plain)
    assert plain[0] not in answer(qwen2, logit_bias={plain[0]: -100.0}).token_ids


def test_penalties_count_the_tokens_of_the_answer(qwen2: LoadedModel) -> None:
    """Two tokens are far more likely than all others; the repeated one falls behind gradually."""
    both = {70: 100.0, 71: 100.0}
    one_kind = answer(qwen2, max_new_tokens=30, logit_bias=both).token_ids
    assert len(set(one_kind)) <= 2
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert set(answer(qwen2, max_new_tokens=30, logit_bias=both, **{penalty: 2.0}).token_ids) == {70, 71}


def test_stop_tokens_end_the_answer_and_are_no_part_of_it(qwen2: LoadedModel) -> None:
    plain = answer(qwen2, max_new_tokens=12).token_ids
    found = answer(qwen2, max_new_tokens=12, stop_token_ids=(plain[5], 1))
    assert found.finish_reason is FinishReason.STOP
    assert found.token_ids == plain[: plain.index(plain[5])]
    assert found.text == answer_text(qwen2.tokenizer, PROMPT, found.token_ids)


def test_end_tokens_can_be_ignored(qwen2: LoadedModel) -> None:
    ended = answer(qwen2, logit_bias={EOS_ID: 100.0})
    assert (ended.finish_reason, ended.token_ids) == (FinishReason.STOP, ())
    going_on = answer(qwen2, logit_bias={EOS_ID: 100.0}, ignore_eos=True, max_new_tokens=4)
    assert (going_on.finish_reason, going_on.token_ids) == (FinishReason.LENGTH, (EOS_ID,) * 4)


def test_no_end_before_the_least_number_of_tokens(qwen2: LoadedModel) -> None:
    found = answer(qwen2, logit_bias={EOS_ID: 100.0, 66: 50.0, 67: 40.0}, stop_token_ids=(66,), min_new_tokens=3)
    assert (found.finish_reason, found.token_ids) == (FinishReason.STOP, (67, 67, 67))


def test_token_ids_outside_the_vocabulary_are_named(qwen2: LoadedModel) -> None:
    size = qwen2.vocab_size
    for field, value in (("stop_token_ids", (size,)), ("logit_bias", {size: 1.0})):
        assert reason(qwen2, **{field: value}) == (f"{field}: token {size} is outside the vocabulary of {size} tokens")


# Stop strings.


def test_a_stop_string_ends_the_answer_and_its_text(model: LoadedModel) -> None:
    plain = answer(model, max_new_tokens=24)
    texts = [plain.text[start : start + length] for start in range(20) for length in (1, 2, 3)]
    stops = {text for text in texts if text and UNFINISHED not in text}
    assert stops
    for stop in stops:
        found = answer(model, max_new_tokens=24, stop=(stop, "never seen"))
        assert found.finish_reason is FinishReason.STOP
        assert found.text == plain.text[: plain.text.index(stop)]
        assert found.token_ids == plain.token_ids[: len(found.token_ids)]
        # The answer ends with the first token that completes the string.
        assert stop in answer_text(model.tokenizer, PROMPT, found.token_ids)
        assert stop not in answer_text(model.tokenizer, PROMPT, found.token_ids[:-1])


def test_stop_strings_in_company(qwen2: LoadedModel) -> None:
    plain = answer(qwen2, max_new_tokens=16)
    engine = make_engine(qwen2, cache=MemoryCache(qwen2.chunk_shape(CHUNK)))
    found = answers(
        engine.run(
            [
                ask("stops", PROMPT, 16, stop=(plain.text[4:6],)),
                ask("goes-on", PROMPT, 16),
                ask("other", PROMPT, 16, stop=("never seen",)),
            ]
        )
    )
    assert found["stops"].text == plain.text[: plain.text.index(plain.text[4:6])]
    assert found["goes-on"].token_ids == found["other"].token_ids == plain.token_ids
    assert found["other"].finish_reason is FinishReason.LENGTH


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\u00e9\u4e66\U0001f600 ", min_size=1, max_size=40),
    strings=st.lists(st.text("ab\u00e9\u4e66\U0001f600 ", min_size=1, max_size=4), min_size=1, max_size=3),
    least=st.integers(0, 6),
)
def test_the_first_stop_string_is_found_wherever_it_is_spread_over_tokens(
    text: str, strings: list[str], least: int
) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    stop = StopStrings(strings, tokenizer, least)
    prompt = tokenizer("prompt")["input_ids"]
    for end in range(1, len(tokens) + 1):
        found = stop.text_before(prompt, tokens[:end])
        whole = answer_text(tokenizer, prompt, tokens[:end])
        searched = answer_text(tokenizer, [*prompt, *tokens[:least]], tokens[least:end]) if end > least else ""
        places = [searched.find(string) for string in strings if string in searched]
        assert found == (whole[: len(whole) - len(searched) + min(places)] if places else None)
        if found is not None:
            break


# Log-probabilities.


def test_logprobs_are_those_of_the_models_own_logits(model: LoadedModel) -> None:
    """Compared with one plain forward pass over prompt and answer, whatever changed the logits before sampling."""
    requests = [
        ask("greedy", PROMPT, 8, logprobs=3),
        ask("sampled", PROMPT, 8, temperature=1.2, seed=1, logprobs=0),
        ask("changed", PROMPT, 8, temperature=0.7, top_k=5, seed=2, logprobs=20, repetition_penalty=1.5),
        ask("biased", PROMPT, 8, logit_bias={65: 50.0}, logprobs=1),
        ask("none", PROMPT, 8),
    ]
    cache = MemoryCache(model.chunk_shape(CHUNK))
    for _ in range(2):
        found = answers(make_engine(model, cache=cache, max_running=5).run(requests))
        assert found["none"].logprobs is None
        for request in requests[:-1]:
            one = found[request.request_id]
            assert one.logprobs is not None
            assert [each.token_id for each in one.logprobs] == list(one.token_ids)
            ids = torch.tensor([[*PROMPT, *one.token_ids]])
            with torch.inference_mode():
                logits = model.model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(PROMPT) - 1 : -1]
            expected = torch.log_softmax(logits.float(), -1)
            for row, each in zip(expected, one.logprobs, strict=True):
                assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-3)
                assert len(each.top) == request.logprobs
                top = row.topk(request.logprobs or 0)
                assert [value for _, value in each.top] == pytest.approx(top.values.tolist(), abs=1e-3)
                for id_, value in each.top:
                    assert value == pytest.approx(float(row[id_]), abs=1e-3)


def test_impossible_tokens_have_a_logprob_that_json_can_hold() -> None:
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 3] = 1.0
    (found,) = token_logprobs(logits, [3], [2])
    assert found.logprob == 0.0
    assert found.top[0] == (3, 0.0)
    assert found.top[1][1] == LEAST_LOGPROB


def test_an_end_token_has_no_logprob(qwen2: LoadedModel) -> None:
    found = answer(qwen2, logit_bias={EOS_ID: 100.0}, min_new_tokens=3, logprobs=1)
    assert found.finish_reason is FinishReason.STOP
    assert found.logprobs is not None
    assert len(found.logprobs) == len(found.token_ids) == 3
