"""The text of an answer: what it adds to the text of its prompt, where it stops, and what of it is final.

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
MARGIN_TOKENS = 8
"""Tokens searched in addition to those that the longest stop string can span."""


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


class StopStrings:
    """The stop strings of one request. The first `least` tokens of its answer are not searched."""

    def __init__(self, strings: Sequence[str], tokenizer: Any, least: int = 0) -> None:
        self._strings = strings
        self._tokenizer = tokenizer
        self._least = least
        # A token in a stop string adds at least one byte of it.
        self._window = LONGEST_CHARACTER * max(map(len, strings)) + MARGIN_TOKENS

    def text_before(self, prompt: Sequence[int], answer: Sequence[int]) -> str | None:
        """The text of the answer before the first stop string; none while there is no stop string in it.

        To be asked after each token: only the answer's end is searched until something is found there.
        """
        tokens = [*prompt, *answer]
        begin = len(prompt) + self._least
        if len(tokens) <= begin:
            return None
        recent = max(begin, len(tokens) - self._window)
        if self._first_in(answer_text(self._tokenizer, tokens[:recent], tokens[recent:])) is None:
            return None
        text = answer_text(self._tokenizer, tokens[:begin], tokens[begin:])
        end = self._first_in(text)
        if end is None:
            return None
        # What is not searched may end within a character, so it has no text of its own.
        whole = answer_text(self._tokenizer, prompt, answer)
        return whole[: len(whole) - len(text) + end]

    def _first_in(self, text: str) -> int | None:
        """Index at which the first stop string begins."""
        return min((place for string in self._strings if (place := text.find(string)) >= 0), default=None)


class TextStream:
    """Gives the text of one answer, piece by piece. It holds back unfinished characters and beginnings of stop strings.

    The pieces are a prefix of what `answer_text` makes of the whole answer. The exception are bytes that are no valid
    UTF-8: some decoders replace more of them the more there are.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stop = stop
        self._decoded = 0
        """Number of tokens of the answer whose text is in `given` or in `_held`."""
        self.told = 0
        """Number of tokens of the answer that have been given to `add`."""
        self.given = ""
        """All text that was returned."""
        self._held = ""

    def add(self, answer: Sequence[int]) -> str:
        """The text that is final by now and was not before. `answer` is the whole answer so far."""
        self.told = len(answer)
        self._held += self._decode(answer)
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text = self._held[: len(self._held) - kept]
        self._held = self._held[len(text) :]
        self.given += text
        return text

    def end(self, answer: Sequence[int], text: str) -> str:
        """What is left of the `text` of the whole answer, which is final now."""
        self.told = len(answer)
        rest = text[len(self.given) :]
        self.given += rest
        return rest

    def _decode(self, answer: Sequence[int]) -> str:
        """The text of the tokens that were not decoded yet and end with a character."""
        before = [*self._prompt, *answer[: self._decoded]]
        # An unfinished character has at most three bytes, and a token adds one at least.
        for end in range(len(answer), max(self._decoded, len(answer) - LONGEST_CHARACTER), -1):
            text = answer_text(self._tokenizer, before, answer[self._decoded : end])
            if not text.endswith(UNFINISHED):
                break
        else:
            end = max(self._decoded, len(answer) - LONGEST_CHARACTER + 1)
            text = answer_text(self._tokenizer, before, answer[self._decoded : end]) if end > self._decoded else ""
        self._decoded = end
        return text


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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and that is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
