"""The text of an answer while it grows: what no later token can change."""

from collections.abc import Sequence
from typing import Any

from inference_service.detokenize import LONGEST_CHARACTER, UNFINISHED, answer_text


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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and that is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
