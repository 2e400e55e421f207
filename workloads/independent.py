"""Requests that share nothing, with a given rate and lengths: measures the capacity of a deployment."""

import math
from collections.abc import Iterator, Mapping
from random import Random

from core.default_slot import default_slot
from core.errors import UserError
from workloads.config import Arrivals, WorkloadConfig
from workloads.timed_request import TimedRequest, request_id
from workloads.token_ids import made_token_ids


class IndependentWorkload:
    """`config.requests` requests, each with its own session and user.

    Arrivals, lengths and tokens have separate random generators: another rate gives the same requests at other times.
    """

    def __init__(self, config: WorkloadConfig) -> None:
        options = config.independent
        if options.prompt_tokens > config.max_prompt_tokens:
            raise UserError(
                f"--prompt-tokens: a mean of {options.prompt_tokens} is above --max-prompt-tokens, "
                f"{config.max_prompt_tokens}; lower the first or raise the second"
            )
        if options.answer_tokens > config.max_new_tokens:
            raise UserError(
                f"--answer-tokens: a mean of {options.answer_tokens} is above --max-new-tokens, "
                f"{config.max_new_tokens}; lower the first or raise the second"
            )
        self._config = config

    @property
    def requests(self) -> int:
        return self._config.requests

    def adjustments(self) -> Mapping[str, int]:
        return {}

    def __iter__(self) -> Iterator[TimedRequest]:
        config, options = self._config, self._config.independent
        arrivals, lengths = Random(f"{config.seed}/arrivals"), Random(f"{config.seed}/lengths")
        at_ms = 0.0
        for index in range(config.requests):
            user_id = f"user-{index + 1:06d}"
            prompt_tokens = drawn_length(lengths, options.prompt_tokens, options.length_cv, config.max_prompt_tokens)
            yield TimedRequest(
                at_ms=at_ms,
                request_id=request_id("independent", config.seed, index),
                session_id=session_with_default_slot(user_id, index % options.even_over, options.even_over),
                user_id=user_id,
                max_new_tokens=drawn_length(lengths, options.answer_tokens, options.length_cv, config.max_new_tokens),
                prompt_token_ids=made_token_ids(config.seed, index, prompt_tokens, config.vocab_size),
            )
            at_ms += self._gap_ms(arrivals)

    def _gap_ms(self, arrivals: Random) -> float:
        rate = self._config.independent.rate_per_s
        spread = arrivals.expovariate(1.0) if self._config.independent.arrivals is Arrivals.POISSON else 1.0
        return 1000 * spread / rate


def session_with_default_slot(user_id: str, slot: int, slots: int) -> str:
    """Return the user's first session id whose default slot is `slot` of `slots`.

    For each divisor d of `slots`, its default slot of d is `slot % d`.
    """
    session = 1
    while default_slot(f"{user_id}/s{session}", slots) != slot:
        session += 1
    return f"{user_id}/s{session}"


def drawn_length(random: Random, mean: int, cv: float, limit: int) -> int:
    """Draw a lognormal length with this `mean` in tokens and coefficient of variation `cv`; clip it to [1, `limit`]."""
    variance = math.log1p(cv * cv)
    drawn = random.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
    return min(max(round(drawn), 1), limit)
