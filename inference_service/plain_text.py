"""Tokenize text so that it never becomes special tokens.

A prompt can spell the tokens that separate turns, `<|im_end|>` or `</s>`, and a tokenizer would turn that text into
those tokens. So text is encoded by a copy of the tokenizer in which these tokens have secret spellings. The special
tokens of a chat template get the secret spellings first. The copy differs in nothing else, so any other text has the
same tokens.
"""

import json
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

SAMPLES = ("", "a", " a  b", "A man, a plan.\n\nIt's 3.14 \u00e9\u4e2d\U0001f600", "a\tb \n")
"""Texts that the copy must encode as the tokenizer does."""


class PlainText:
    """Encodes text of users, and the special tokens that templates write around it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        controls = control_tokens(tokenizer)
        self.control_tokens = _pattern(controls)
        """Matches text that the tokenizer would turn into a special token."""
        self._spellings, copy = _with_other_spellings(tokenizer, controls)
        self._copy = copy
        self._inseparable = _pattern([token for token in controls if token not in self._spellings])

    def inseparable(self, text: str) -> str | None:
        """A special token in `text` that this tokenizer cannot read as text; None if there is none."""
        found = self._inseparable.search(text)
        return found and found[0]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of plain text. `add_special_tokens` adds those that the tokenizer begins and ends a text with."""
        if self._copy is None:
            ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return ids
        return list(self._copy.encode(text, add_special_tokens=add_special_tokens).ids)

    def as_control(self, token: str) -> str:
        """The spelling that `encode` turns into the special token `token`."""
        return self._spellings.get(token, token)


def control_tokens(tokenizer: Any) -> list[str]:
    """Spellings of the special tokens, and of added ones that the chat template writes, such as marks of turns."""
    template = tokenizer.chat_template or ""
    text = "\n".join(template.values()) if isinstance(template, dict) else template
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        # White space may be an added token (Gemma). In a template it is no mark of a turn.
        if token.special or (token.content in text and not token.content.isspace())
    ]


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens. If several begin at one place, it matches the longest."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _with_other_spellings(tokenizer: Any, controls: list[str]) -> tuple[Mapping[str, str], Tokenizer | None]:
    """The new spelling of each control token, and a copy of the tokenizer's backend that has these spellings.

    A token keeps its spelling if it would be recognised in other places under a new one. There is no copy if the
    tokenizer has no backend, or if the copy would encode ordinary text differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not controls:
        return {}, None
    # Letters alone, which no normalizer changes.
    spellings = {token: f"x{secrets.token_hex(12)}x" for token in controls}
    for _ in range(2):
        try:
            copy = _respelled(backend, spellings)
        except Exception as error:  # the library's own
            logger.warning("special tokens in text are not told apart: %s", " ".join(str(error).split())[:300])
            return {}, None
        wrong = [token for token in spellings if not _agrees(tokenizer, copy, token, spellings[token])]
        if not wrong:
            break
        spellings = {token: spelling for token, spelling in spellings.items() if token not in wrong}
    ids = tokenizer.get_added_vocab()
    same = all(copy.token_to_id(spellings.get(token, token)) == index for token, index in ids.items()) and all(
        copy.encode(text, add_special_tokens=special).ids == tokenizer(text, add_special_tokens=special)["input_ids"]
        for text in SAMPLES
        for special in (True, False)
    )
    if wrong or not same:
        logger.warning("special tokens in text are not told apart: a copy of the tokenizer encodes otherwise")
        return {}, None
    return spellings, copy


def _agrees(tokenizer: Any, copy: Tokenizer, token: str, spelling: str) -> bool:
    """True if the copy recognises `spelling` in the same places and as the same id as the tokenizer does `token`."""
    return all(
        copy.encode(text.format(spelling), add_special_tokens=False).ids
        == tokenizer(text.format(token), add_special_tokens=False)["input_ids"]
        for text in ("{}", "a{}b", " a {} b")
    )


def _respelled(backend: Tokenizer, spellings: Mapping[str, str]) -> Tokenizer:
    content = json.loads(backend.to_str())
    content["truncation"] = content["padding"] = None
    for added in content["added_tokens"]:
        added["content"] = spellings.get(added["content"], added["content"])
    model = content["model"]

    def rename(piece: str) -> str:
        return spellings.get(piece, piece)

    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(piece): index for piece, index in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[rename(piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = rename(model["unk_token"])
    return Tokenizer.from_str(json.dumps(content))
