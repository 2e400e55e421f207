"""Decides when the answer of a sequence ends, reports its tokens, and makes its completion."""

from typing import Any

from core.records import Choice, FinishReason
from inference_service.active_sequence import ActiveSequence
from inference_service.completion import Completion, TokenEvent
from inference_service.detokenize import answer_text


def finish_reason(sequence: ActiveSequence, max_len: int, now_ms: float) -> FinishReason | None:
    """Why a sequence ends with its newest token; none while it goes on. To be asked after each token.

    `max_len`: maximum tokens of prompt and answer.
    """
    if sequence.output[-1] in sequence.sampler.end_tokens:
        return FinishReason.STOP
    if sequence.stop is not None:
        sequence.stopped_text = sequence.stop.text_before(sequence.prompt, sequence.output)
        if sequence.stopped_text is not None:
            return FinishReason.STOP
    if len(sequence.output) >= sequence.request.max_new_tokens:
        return FinishReason.LENGTH
    if len(sequence.prompt) + len(sequence.output) >= max_len:
        return FinishReason.CONTEXT
    return FinishReason.DEADLINE if now_ms >= sequence.expires_ms else None


def tell_token(sequence: ActiveSequence, reason: FinishReason | None) -> None:
    """Report the newest token of a sequence once, if its request asked for that. `reason`: of `finish_reason`."""
    on_token, stream = sequence.parent.on_token, sequence.stream
    if (
        on_token is None
        or stream is None
        or stream.told == len(sequence.output)
        or _ends_with_end_token(sequence, reason)
    ):
        return
    if sequence.stopped_text is None:
        text = stream.add(sequence.output)
    else:
        text = stream.end(sequence.output, sequence.stopped_text)
    logprob = sequence.logprobs[-1] if sequence.request.logprobs is not None else None
    on_token(TokenEvent(sequence.request, sequence.choice, sequence.output[-1], logprob, text))


def completion_of(sequence: ActiveSequence, reason: FinishReason, tokenizer: Any, now_ms: float) -> Completion:
    """The completion of a request with this one choice. May raise what the tokenizer raises."""
    request = sequence.request
    answer = sequence.output[:-1] if _ends_with_end_token(sequence, reason) else sequence.output
    text = sequence.stopped_text
    if text is None:
        text = answer_text(tokenizer, sequence.prompt, answer)
    prompt = len(sequence.prompt)
    steps = max(0, len(sequence.output) - 1)
    choice = Choice(
        text=text,
        token_ids=tuple(answer),
        logprobs=None if request.logprobs is None else tuple(sequence.logprobs[: len(answer)]),
        finish_reason=reason,
    )
    return Completion(
        request=request,
        choices=(choice,),
        prompt_logprobs=(None, *sequence.prompt_logprobs) if sequence.is_scored else None,
        sampling=sequence.sampler.sampling,
        prompt_tokens=prompt,
        local_tokens=sequence.local_tokens,
        remote_tokens=sequence.remote_tokens,
        computed_tokens=prompt - sequence.local_tokens - sequence.remote_tokens,
        decode_steps=steps,
        decode_rows=sequence.rows_decoded / steps if steps else None,
        began_with=sequence.began_with,
        cache_capacity_chunks=sequence.capacity_chunks,
        cache_used_chunks=sequence.used_chunks,
        arrived_ms=sequence.arrived_ms,
        began_ms=sequence.began_ms,
        first_token_ms=sequence.first_token_ms,
        last_token_ms=sequence.computed_ms if sequence.output else None,
        finished_ms=now_ms,
    )


def _ends_with_end_token(sequence: ActiveSequence, reason: FinishReason | None) -> bool:
    """True if the newest token ended the answer and is no part of it."""
    return reason is FinishReason.STOP and sequence.stopped_text is None
