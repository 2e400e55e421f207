"""The text of an answer: what it adds to the text of its prompt.

An answer that is decoded alone loses what tokenizers drop at the beginning of a text, such as SentencePiece's first
space. So it is decoded with the end of its prompt in front, which is then cut off.
"""

from collections.abc import Sequence
from typing import Any

PROMPT_TOKENS = 8
"""Tokens of the prompt's end that are decoded with an answer. More are used if these have no text."""
LONGEST_CHARACTER = 4
"""Maximum bytes of one character in UTF-8, and so its maximum tokens."""
UNFINISHED = "\ufffd"
"""The character that decoders put in place of bytes that form no character, or not yet."""


def answer_text(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text that the token ids `answer` add to `prompt`, without special tokens.

    A character that the answer leaves unfinished becomes a replacement character. A character that the prompt begins
    and the answer finishes belongs to the answer.
    """
    if not answer:
        return ""

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    context, before = _context(prompt, decode)
    # If a character is unfinished, some decoders replace all bytes before it as well.
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
    """The end of the prompt, from the beginning of a character on, and its text.

    The text is empty only if the prompt's is.
    """
    count = PROMPT_TOKENS
    while True:
        context = prompt[-count:]
        before = decode(context)
        if count >= len(prompt) or (before and not before.startswith(UNFINISHED)):
            return context, before
        count *= 2


def _common(one: str, other: str) -> int:
    """Length of the common beginning of both."""
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
