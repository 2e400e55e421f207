"""Tokenize text so that no special token comes of it, however it is spelled.

Whoever writes a prompt may spell the tokens that separate turns, `<|im_end|>` or `</s>`, and a tokenizer would make
those tokens of it. So text is encoded by a copy of the tokenizer in which these tokens have other spellings, which
nobody knows. A chat template's own are put into those spellings first; everything else about the copy is the same, and
so are the tokens of any other text.
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
"""Texts that the copy has to encode as the tokenizer does."""


class PlainText:
    """A tokenizer for what users write and what templates write around it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        controls = control_tokens(tokenizer)
        self.control_tokens = _pattern(controls)
        """Matches what the tokenizer would make a special token of."""
        self._spellings, copy = _with_other_spellings(tokenizer, controls)
        self._copy = copy
        self._inseparable = _pattern([token for token in controls if token not in self._spellings])

    def inseparable(self, text: str) -> str | None:
        """A special token in `text` that this tokenizer cannot read as text; None if there is none."""
        found = self._inseparable.search(text)
        return found and found[0]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of plain text; with those that the tokenizer itself begins and ends a text with, or without."""
        if self._copy is None:
            ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return ids
        return list(self._copy.encode(text, add_special_tokens=add_special_tokens).ids)

    def as_control(self, token: str) -> str:
        """What `encode` makes the special token `token` of."""
        return self._spellings.get(token, token)


def control_tokens(tokenizer: Any) -> list[str]:
    """Spellings of the special tokens, and of added ones that the chat template writes, such as marks of turns."""
    template = tokenizer.chat_template or ""
    text = "\n".join(template.values()) if isinstance(template, dict) else template
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        # A template contains white space that is a token of its own, as Gemma's, without meaning a mark by it.
        if token.special or (token.content in text and not token.content.isspace())
    ]


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens; the longest where several begin at a place."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _with_other_spellings(tokenizer: Any, controls: list[str]) -> tuple[Mapping[str, str], Tokenizer | None]:
    """A copy of the tokenizer's backend with other spellings of control tokens, and those by the token.

    Tokens that would be recognised in other places under another spelling keep theirs. No copy where there is no
    backend, or where a copy would encode ordinary text otherwise.
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
    """Whether the copy knows `spelling` where, and as what, the tokenizer knows `token`."""
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
