"""Restricts the next token, so that an answer is JSON, matches an expression, or is one of some choices."""

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.errors import LONGEST_FAULT, UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Bits = NDArray[np.uint32]


def allow(bits: Bits, tokens: Collection[int]) -> None:
    """Set the bits of tokens. Tokens that have no bit are ignored."""
    for token in tokens:
        if token < 32 * len(bits):
            bits[token // 32] |= np.uint32(1 << token % 32)


def exclude(bits: Bits, tokens: Collection[int]) -> None:
    """Clear the bits of tokens."""
    for token in tokens:
        if token < 32 * len(bits):
            bits[token // 32] &= ~np.uint32(1 << token % 32)


class AnswerGrammar:
    """The grammar of one answer. Its state depends on the answer so far alone, so asking changes nothing."""

    def __init__(self, matcher: "LLMatcher", tokens: int, end_tokens: Collection[int]) -> None:
        """`tokens`: size of the tokenizer's vocabulary; `end_tokens`: the library's end of a text."""
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._consumed = 0
        self._mask = np.empty(-(-tokens // 32), dtype=np.uint32)

    def fill(self, bits: Bits, output: Sequence[int]) -> bool:
        """Set the bit of each token that may follow `output`, and clear all others; returns whether it may end here.

        `bits` `[words]`: token `i` is bit `i % 32` of word `i // 32`. There may be fewer or more than the tokenizer has
        tokens. End tokens are not set. Raises `UserError` where the grammar is too complex at this place.
        """
        if len(output) < self._consumed:
            self._matcher.reset()
            self._consumed = 0
        if len(output) > self._consumed:
            self._matcher.consume_tokens(list(output[self._consumed :]))
            self._consumed = len(output)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise UserError(f"response_format: {reason_of(self._matcher)}; simplify it")
        known = min(len(bits), len(self._mask))
        bits[:known] = self._mask[:known]
        bits[known:] = 0
        exclude(bits, self._end_tokens)
        return bool(self._matcher.is_accepting())


_REASONS = {
    "NoExtension": "no finite text satisfies it",
    "coerce_one_of": "oneOf is only possible for schemas that exclude one another; use anyOf",
    "too big": "too large or too complex",
    "too large": "too large or too complex",
    "too many": "too large or too complex",
    "items; max": "too large or too complex",
}
"""Plain reasons for parts of the library's messages."""
_DETAIL = re.compile(r"^error: (.*)$|\(in regex\): (?!regex parse error)(.*)$", re.MULTILINE)
"""Finds the reason in a message of the library about a regular expression, which quotes the whole expression."""


def reason_of(matcher: "LLMatcher") -> str:
    """Why a matcher is in error, for the sender of its request."""
    message = matcher.get_error().removesuffix("<non-verbose/>")
    for part, reason in _REASONS.items():
        if part in message:
            return reason
    detail = _DETAIL.search(message)
    return one_line_of(detail[1] or detail[2] if detail else message.replace("Unimplemented keys", "not supported"))


def one_line_of(message: str) -> str:
    """A message of the library in one line, cut."""
    return " ".join(message.split())[:LONGEST_FAULT]
