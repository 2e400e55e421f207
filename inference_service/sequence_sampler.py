"""How the tokens of one answer are chosen, apart from the logits: rules, penalties, random numbers and grammar."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.records import Sampling
from inference_service.grammar import AnswerGrammar, Bits, allow, exclude

LEAST_TEMPERATURE = 1e-5
"""Below it the largest logit is taken: float32 logits differ by more than such a temperature, or not at all."""
PROPOSALS = 128
"""Tokens proposed at a time: at the least favourable probabilities none is taken one time in 4,000."""
_TOKENS_AT_ONCE = 16
"""Tokens of an answer whose uniform numbers are made together."""

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class TokenRules:
    """Token ids that are forbidden or forced at certain places of an answer."""

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    """Forbidden as the first token of an answer."""
    forced_last: tuple[int, ...] = ()
    """One of these is the last token of an answer of full length."""

    @property
    def names(self) -> tuple[str, ...]:
        """The rules in force, named as in `generation_config.json`."""
        rules = {
            "suppress_tokens": self.suppressed,
            "begin_suppress_tokens": self.suppressed_first,
            "forced_eos_token_id": self.forced_last,
        }
        return tuple(name for name, tokens in rules.items() if tokens)


class SequenceSampler:
    """How the tokens of one answer are chosen. The state is a function of the answer so far: asking changes nothing."""

    def __init__(
        self,
        sampling: Sampling,
        rules: TokenRules = TokenRules(),
        *,
        prompt: Sequence[int] = (),
        most_tokens: int = 1 << 62,
        end_tokens: Collection[int] = (),
        choice: int = 0,
        grammar: AnswerGrammar | None = None,
    ) -> None:
        """`most_tokens`: that the answer may have; `end_tokens`: those that end it; `choice`: index among the answers
        to one request, each of which has random numbers of its own; `grammar`: of this answer's text.
        """
        self.sampling = sampling
        self.greedy = sampling.temperature < LEAST_TEMPERATURE
        self.filtered = not self.greedy and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
        self.penalised = sampling.repetition_penalty != 1
        self._rules = rules
        self._most_tokens = most_tokens
        self._end_tokens = end_tokens
        self._grammar = grammar
        self._seen = _Seen(prompt) if self.penalised else None
        counts_answer = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._subtracted = _Subtracted(sampling) if counts_answer else None
        self._bias = _arrays(sampling.logit_bias) if sampling.logit_bias else _NO_BIAS
        self._uniforms = _Uniforms(0 if sampling.seed is None else sampling.seed, choice)

    def draw(self, output: Sequence[int]) -> "Draw":
        """The next token after `output`."""
        return Draw(self, output)

    def uniforms(self, index: int, attempt: int = 0) -> Numbers:
        """`[2, PROPOSALS]` numbers in [0, 1) that token `index` of the answer is drawn with; others each attempt."""
        return self._uniforms.of(index, attempt)

    def seen(self, output: Sequence[int]) -> Ids:
        """Token ids of the prompt and of `output`, each at least once."""
        assert self._seen is not None
        return self._seen.with_output(output)

    def added(self, output: Sequence[int]) -> list[tuple[Ids, Numbers]]:
        """Token ids, and what is added to their logits: by the bias, and by presence and frequency penalty."""
        parts = [self._bias] if len(self._bias[0]) else []
        if self._subtracted is not None:
            ids, subtracted = self._subtracted.of(output)
            parts.append((ids, -subtracted))
        return parts

    @property
    def end_tokens(self) -> Collection[int]:
        """The token ids that end the answer."""
        return self._end_tokens

    def forbidden(self, index: int) -> Ids:
        """Token ids that token `index` of the answer must not be, whatever its grammar says."""
        tokens = self._suppressed(index)
        if self._grammar is None and index < self.sampling.min_new_tokens and not self.forced(index):
            tokens += sorted(self._end_tokens)
        return np.asarray(tokens, dtype=np.int64)

    def forced(self, index: int) -> tuple[int, ...]:
        """Token ids of which token `index` of the answer must be one; none where it is free.

        A grammar is free of them: an end that is forced would hide that the answer is not complete.
        """
        return self._rules.forced_last if index == self._most_tokens - 1 and self._grammar is None else ()

    @property
    def has_grammar(self) -> bool:
        return self._grammar is not None

    def fill_allowed(self, bits: Bits, output: Sequence[int]) -> None:
        """Set the bits of the tokens that the grammar allows after `output`, and clear all others; see `AnswerGrammar`.

        An end token is allowed where the text is complete. There `min_new_tokens` holds as long as the grammar allows
        more text. Raises `UserError` where no token is allowed.
        """
        assert self._grammar is not None
        index = len(output)
        may_end = self._grammar.fill(bits, output)
        exclude(bits, self._end_tokens)
        exclude(bits, self._suppressed(index))
        if may_end and (index >= self.sampling.min_new_tokens or not bits.any()):
            allow(bits, self._end_tokens)
            exclude(bits, self._suppressed(index))
        if not bits.any():
            raise UserError(
                f"response_format: after {index} tokens no token is left that it allows and that is neither an end "
                "token nor suppressed; change it, or stop_token_ids"
            )

    def _suppressed(self, index: int) -> list[int]:
        return [*self._rules.suppressed, *(self._rules.suppressed_first if index == 0 else ())]

    def constrains(self, index: int) -> bool:
        """True if anything is penalised, forbidden or forced at token `index`."""
        return (
            self.penalised
            or self._grammar is not None
            or self._subtracted is not None
            or len(self._bias[0]) > 0
            or bool(self._rules.suppressed)
            or (index == 0 and bool(self._rules.suppressed_first))
            or index < self.sampling.min_new_tokens
            or bool(self.forced(index))
        )


def _arrays(bias: Mapping[int, float]) -> tuple[Ids, Numbers]:
    return np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float64)


_NO_BIAS = _arrays({})


class _Seen:
    """The ids of a prompt once each, and of the answer as they come, in one array."""

    def __init__(self, prompt: Sequence[int]) -> None:
        prompt_ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._prompt = len(prompt_ids)
        self._ids = np.empty(self._prompt + 64, dtype=np.int64)
        self._ids[: self._prompt] = prompt_ids
        self._output = 0

    def with_output(self, output: Sequence[int]) -> Ids:
        end = self._prompt + len(output)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(end, dtype=np.int64)])
        self._ids[self._prompt + self._output : end] = output[self._output :]
        self._output = len(output)
        return self._ids[:end]


class _Subtracted:
    """Presence and frequency penalty of each token of one answer. Counts only the tokens added since the last call."""

    def __init__(self, sampling: Sampling) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64)
        self._output = 0

    def of(self, output: Sequence[int]) -> tuple[Ids, Numbers]:
        """The ids of `output` once each, and the penalty of each."""
        for token in output[self._output :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._counts[place] += 1
        self._output = len(output)
        end = len(self._places)
        return self._ids[:end], self._presence + self._frequency * self._counts[:end]


class _Uniforms:
    """Uniform numbers of each token of an answer, from Philox (Salmon et al., SC 2011): seed and choice are the key.

    The counter holds the place in the answer and the attempt, so that numbers can be had in any order.
    """

    def __init__(self, seed: int, choice: int) -> None:
        self._key = seed | choice << 64
        self._made: tuple[int, int] | None = None
        self._numbers: Numbers = np.empty(0)

    def of(self, index: int, attempt: int) -> Numbers:
        part, place = divmod(index, _TOKENS_AT_ONCE)
        if self._made != (part, attempt):
            generator = np.random.Philox(key=self._key, counter=[0, part, attempt, 0])
            bits = generator.random_raw(_TOKENS_AT_ONCE * 2 * PROPOSALS)
            # The 53 bits that a float64 in [0, 1) has.
            self._numbers = ((bits >> np.uint64(11)) * 2.0**-53).reshape(_TOKENS_AT_ONCE, 2, PROPOSALS)
            self._made = part, attempt
        numbers: Numbers = self._numbers[place]
        return numbers


@dataclass(frozen=True)
class Draw:
    """One token that is wanted: the next one after `output`."""

    sampler: SequenceSampler
    output: Sequence[int]

    @property
    def index(self) -> int:
        return len(self.output)
