"""Formats of answers become grammars over bytes.

`llguidance` says which tokens continue a text that a grammar begins with. It refuses the parts of a JSON schema that it
cannot enforce, and bounds what a grammar may cost in time and memory. This module is imported with the first format:
most jobs have none.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from tokenizers import Tokenizer

from core.errors import UserError
from core.records import ResponseFormat
from inference_service.grammar import AnswerGrammar, one_line_of, reason_of

KEPT_GRAMMARS = 64
"""Maximum number of compiled grammars that are kept for later requests. The least recently used one is dropped."""
LIMITS = LLParserLimits(
    max_grammar_size=20_000,
    max_items_in_row=10_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)
"""Bounds of the library for one grammar. They allow some 2,000 optional properties or 10,000 values of an `enum`. A
grammar takes up to a second to compile and 100 MB, both of which only hostile ones need; ordinary ones take 1 ms."""
MAX_MULTIPLE = 10_000
"""Largest common multiple of all `multipleOf` of a schema. An automaton counts remainders, so that a million takes 13 s
to compile, which no bound of the library prevents."""
PROBED_TOKENS = 3
"""Number of tokens for which a new grammar is tried before it is accepted."""
WHITESPACE = r"[ \t\n\r]{1,64}"
"""Blanks between two parts of JSON. Without a bound, some models write line breaks until the answer's last token."""
JSON_OBJECT = {"type": "object"}


class Grammars:
    """Compiles formats for one tokenizer. Compiled ones are kept, up to `KEPT_GRAMMARS`."""

    def __init__(self, tokenizer: Any, end_tokens: Collection[int]) -> None:
        """`end_tokens`: the model's own."""
        self._source = tokenizer
        self._end_tokens = end_tokens
        self._compiled: OrderedDict[str, LLMatcher | str] = OrderedDict()
        """For each format, as JSON: the grammar to copy for an answer, or the reason why the format is refused."""

    def of(self, response_format: ResponseFormat) -> AnswerGrammar:
        """The grammar of one answer that is to begin. Raises `UserError` for a format that cannot be enforced."""
        key = response_format.model_dump_json()
        if key not in self._compiled:
            self._compiled[key] = self._compile(response_format)
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        compiled = self._compiled[key]
        if isinstance(compiled, str):
            raise UserError(compiled)
        assert isinstance(self._tokenizer, LLTokenizer)
        return AnswerGrammar(compiled.deep_copy(), self._tokenizer.vocab_size, self._end_tokens)

    @cached_property
    def _tokenizer(self) -> LLTokenizer | str:
        """The tokenizer in the library's form, or the reason why no format is possible with it."""
        if not self._end_tokens:
            return "this model has no end token to end such an answer"
        try:
            return LLTokenizer(_saved(self._source), eos_token=sorted(self._end_tokens))
        except (AttributeError, ValueError) as error:
            return f"not possible with this model's tokenizer ({one_line_of(str(error))})"

    def _compile(self, response_format: ResponseFormat) -> LLMatcher | str:
        if isinstance(self._tokenizer, str):
            return f"response_format: {self._tokenizer}; leave it out"
        field, grammar = _field(response_format), _grammar(response_format)
        if grammar is None:
            return f"{field}: the common multiple of all multipleOf is above {MAX_MULTIPLE}; lower them"
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        _probe(matcher)
        if matcher.is_error():
            return f"{field}: {reason_of(matcher)}; change or simplify it"
        matcher.reset()
        return matcher


def _field(response_format: ResponseFormat) -> str:
    """The name of the request's field that holds the format, for error messages."""
    field = {"json_schema": ".json_schema.schema", "regex": ".regex", "choice": ".choice"}.get(response_format.type, "")
    return f"response_format{field}"


def _grammar(response_format: ResponseFormat) -> str | None:
    """The format in the library's form; none for a schema that would take too long to compile."""
    if response_format.regex is not None:
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(response_format.regex, use_ascii='dws')}/")
    if response_format.choice is not None:
        # A Lark string is written as in JSON, and JSON of ASCII alone has no character that Lark does not take.
        choices = " | ".join(map(json.dumps, dict.fromkeys(response_format.choice)))
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    schema = JSON_OBJECT if response_format.json_schema is None else response_format.json_schema.definition
    if _common_multiple(schema) > MAX_MULTIPLE:
        return None
    # A schema may carry options of the library; these win over them.
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
    )


def _saved(tokenizer: Any) -> str:
    """The content of a tokenizer's `tokenizer.json`, with all added tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()


def _common_multiple(schema: dict[str, Any]) -> int:
    multiple = 1
    for value in _values_of("multipleOf", schema):
        if not isinstance(value, int | float) or not value or not math.isfinite(value):
            continue
        digits = abs(Decimal(str(value)))
        multiple = math.lcm(multiple, int(digits.scaleb(max(0, -int(digits.as_tuple().exponent)))))
        if multiple > MAX_MULTIPLE:
            break
    return multiple


def _values_of(key: str, schema: Any) -> Iterator[Any]:
    """The values of `key` wherever it is in nested objects and lists."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if key in part:
                yield part[key]
            left += part.values()
        elif isinstance(part, list):
            left += part


def _probe(matcher: LLMatcher) -> None:
    """Ask for the first tokens: only then do some grammars turn out to be too complex, or to have no finite text."""
    for _ in range(PROBED_TOKENS):
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.is_error() or matcher.is_stopped() or not allowed.any():
            break
        matcher.consume_token(int(allowed.argmax()))
