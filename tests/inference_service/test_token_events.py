"""Events of a growing answer: tokens, log-probabilities, and final text."""

from collections import defaultdict

import pytest
from engine_helpers import CHUNK, EOS_ID, MemoryCache, answers, ask, make_engine, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import KINDS

from core.records import FinishReason
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import TokenEvent
from inference_service.detokenize import TextStream, answer_text
from inference_service.model import LoadedModel

BYTES = byte_tokenizer()
TOKENIZERS = {"bytes": BYTES, **{kind: KINDS[kind]() for kind in ("byte_level_bpe", "prefixed_bpe", "metaspace_bpe")}}


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    texts=st.tuples(st.text(max_size=4), st.text("ab \u20ac\U0001f600\u4e2d", min_size=1, max_size=14)),
    stop=st.text("ab\u20ac", min_size=1, max_size=4),
)
def test_text_is_never_cut_within_a_character_or_a_stop_string(kind: str, texts: tuple[str, str], stop: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    whole = answer_text(tokenizer, prompt, answer)
    stream = TextStream(tokenizer, prompt, (stop,))
    said = ""
    for end in range(1, len(answer) + 1):
        said += stream.add(answer[:end])
        assert whole.startswith(said)
        if stop not in answer_text(tokenizer, prompt, answer[:end]):
            assert stop not in whole or len(said) <= whole.index(stop)
    # Only text that may become a stop string is held back.
    assert len(whole) - len(said) < len(stop)
    assert said + stream.end(answer, whole) == whole


@settings(max_examples=200, deadline=None)
@given(answer=st.lists(st.integers(0, 255), min_size=1, max_size=24))
def test_pieces_are_a_prefix_of_the_text_of_any_bytes(answer: list[int]) -> None:
    whole = answer_text(BYTES, [], answer)
    stream = TextStream(BYTES, [])
    said = ""
    for end in range(1, len(answer) + 1):
        said += stream.add(answer[:end])
        assert whole.startswith(said)
    # An unfinished character has three bytes at most.
    assert len(whole) - len(said) <= 3
    assert said + stream.end(answer, whole) == whole


@pytest.mark.parametrize("reuse", [False, True])
def test_tokens_are_told_as_they_come(qwen2: LoadedModel, reuse: bool) -> None:
    pairs = tuple(one + other for one in "abc" for other in "abc")
    bias = dict.fromkeys(BYTES("abc", add_special_tokens=False)["input_ids"], 100.0)
    requests = [
        ask("plain", tokens_of(1, 9), 12, logprobs=1),
        ask("sampled", tokens_of(2, 30), 12, temperature=1.0, seed=1, n=3, logit_bias=bias, logprobs=0),
        ask("stopped", tokens_of(3, 12), 40, temperature=1.0, seed=2, n=2, logit_bias=bias, stop=pairs),
        ask("ended", tokens_of(4, 12), 12, logit_bias={EOS_ID: 100.0}, min_new_tokens=3),
        ask("untold", tokens_of(5, 12), 12),
    ]
    cache = MemoryCache(qwen2.chunk_shape(CHUNK)) if reuse else None
    engine = make_engine(qwen2, cache=cache, step_prefill_tokens=16)
    told: dict[tuple[str, int], list[TokenEvent]] = defaultdict(list)
    done = []

    def tell(event: TokenEvent) -> None:
        assert event.request.request_id not in {one.request.request_id for one in done}
        told[event.request.request_id, event.choice].append(event)

    for request in requests:
        engine.submit(request, 0.0, None if request.request_id == "untold" else tell)
    while engine.unfinished:
        done += engine.step()
    found = answers(done)
    expected = {(name, index) for name, one in found.items() for index in range(len(one.choices)) if name != "untold"}
    assert told.keys() == expected
    for (name, index), events in told.items():
        choice = found[name].choices[index]
        assert tuple(event.token_id for event in events) == choice.token_ids
        assert choice.text.startswith("".join(event.text for event in events))
        if choice.logprobs is None:
            assert {event.logprob for event in events} == {None}
        else:
            assert tuple(event.logprob for event in events) == choice.logprobs
    stopped = found["stopped"].choices
    assert [(choice.text, choice.finish_reason) for choice in stopped] == [("", FinishReason.STOP)] * 2
    for index, choice in enumerate(stopped):
        assert "".join(event.text for event in told["stopped", index]) == choice.text
    alone = answers(make_engine(qwen2).run(requests))
    for name, one in alone.items():
        assert [(c.text, c.token_ids, c.finish_reason) for c in one.choices] == [
            (c.text, c.token_ids, c.finish_reason) for c in found[name].choices
        ]
