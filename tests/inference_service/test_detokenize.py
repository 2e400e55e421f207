"""The text of an answer: prompt and answer make the whole text, whatever the tokenizer does at its beginning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizers import CORPUS, KINDS
from transformers import PreTrainedTokenizerFast

from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.detokenize import answer_text

TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    **{kind: make() for kind, make in KINDS.items()},
    "bytes": byte_tokenizer(),
}
WITHOUT_LOSS = ["byte_level_bpe", "prefixed_bpe", "metaspace_bpe", "bytes"]
texts = st.lists(st.sampled_from(" ".join(CORPUS).split(" ")) | st.text(max_size=3), max_size=10).map(" ".join)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_continues_its_prompt(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = "The capital of France is"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prompt} Paris. \u4e2d\U0001f600", add_special_tokens=False)["input_ids"]
    assert whole[: len(before)] == before
    text = answer_text(tokenizer, before, whole[len(before) :])
    assert decoded(tokenizer, before) + text == decoded(tokenizer, whole)
    assert text[0] == " "


@given(kind=st.sampled_from(WITHOUT_LOSS), text=texts, data=st.data())
def test_prompt_and_answer_are_the_whole_wherever_it_is_cut(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text)["input_ids"]
    cuts = [cut for cut in range(len(ids) + 1) if "\ufffd" not in decoded(tokenizer, ids[:cut])]
    cut = data.draw(st.sampled_from(cuts))
    assert decoded(tokenizer, ids[:cut]) + answer_text(tokenizer, ids[:cut], ids[cut:]) == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", ["prefixed_bpe", "metaspace_bpe", "bytes"])
def test_an_unfinished_character_spoils_no_other(kind: str) -> None:
    """A byte decoder rejects a whole run of bytes for one unfinished character."""
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer("\u7530", add_special_tokens=False)["input_ids"]
    answer = tokenizer("\u7530\u4e66\u6c34", add_special_tokens=False)["input_ids"][len(prompt) :]
    assert answer_text(tokenizer, prompt, answer) == "\u4e66\u6c34"
    assert answer_text(tokenizer, prompt, answer[:-1]).rstrip("\ufffd") == "\u4e66"
    assert answer_text(tokenizer, prompt, answer[:1]).rstrip("\ufffd") == ""
    # A prompt of token ids may end within a character. The tokens that complete it belong to the answer.
    assert answer_text(tokenizer, prompt[:-1], [prompt[-1], *answer]) == "\u7530\u4e66\u6c34"
    # A stray byte does not change the text of the prompt.
    assert answer_text(tokenizer, prompt, [prompt[-1], *tokenizer("a")["input_ids"]]).strip("\ufffd").endswith("a")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer("The capital", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    # If only special tokens precede it, the answer begins the text.
    assert answer_text(tokenizer, [start] * 20, ids) == decoded(tokenizer, ids)
    assert (
        answer_text(tokenizer, [*ids, end, start], [*ids, end])
        == decoded(tokenizer, [*ids, *ids])[len(decoded(tokenizer, ids)) :]
    )


def test_an_answer_of_nothing_is_no_text() -> None:
    assert answer_text(byte_tokenizer(), [65, 66], []) == ""
    # Even if the prompt cannot be decoded: a passed deadline must not end in an error.
    assert answer_text(None, [65, 66], []) == ""
