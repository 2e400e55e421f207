"""The text of an answer: what it adds to the text of its prompt.

Decoded alone, an answer would lose what tokenizers drop at the beginning of a text: SentencePiece its first space.
Decoded with the end of its prompt in front of it, and that cut off again, it continues the prompt.
"""

from collections.abc import Sequence
from typing import Any

PROMPT_TOKENS = 8
"""Tokens of the prompt's end that an answer is decoded after; more where those are no text of their own."""
LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most, of one character in UTF-8."""
UNFINISHED = "\ufffd"
"""What decoders make of bytes that are no character, or not yet."""


def answer_text(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text that the token ids `answer` add to `prompt`, without special tokens.

    A character that the answer leaves unfinished is a replacement character; one that the prompt has begun and the
    answer finishes is the answer's.
    """

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    context, before = _context(prompt, decode)
    # Where a character is unfinished, some decoders give up all bytes before it as well.
    for finished in (*range(len(answer), max(-1, len(answer) - LONGEST_CHARACTER), -1), len(answer)):
        text = decode([*context, *answer[:finished]])
        if not text.endswith(UNFINISHED):
            break
    if text.startswith(before):
        text = text[len(before) :]
    elif before.endswith(UNFINISHED):
        text = text[_common(before, text) :]
    else:
        text = decode(answer[:finished])
    return text + decode(answer[finished:]) if finished < len(answer) else text


def _context(prompt: Sequence[int], decode: Any) -> tuple[Sequence[int], str]:
    """The end of the prompt, from the beginning of a character on, and its text; it has some, if the prompt has."""
    count = PROMPT_TOKENS
    while True:
        context = prompt[-count:]
        before = decode(context)
        if count >= len(prompt) or (before and not before.startswith(UNFINISHED)):
            return context, before
        count *= 2


def _common(one: str, other: str) -> int:
    """Characters at the beginning that both have."""
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
