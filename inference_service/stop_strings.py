"""Strings that end an answer, also where they are spread over several tokens."""

from collections.abc import Sequence
from typing import Any

from inference_service.detokenize import LONGEST_CHARACTER, answer_text

MARGIN_TOKENS = 8
"""Tokens searched in addition to those that the longest stop string can span."""


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
