"""Log-probabilities of sampled tokens and of the likeliest alternatives, before penalties, filters and temperature."""

from collections.abc import Sequence

import torch

from core.records import TokenLogprob
from inference_service.sampling import BatchSampler, Sampled, greatest
from inference_service.sequence_sampler import Draw

CHUNK_ELEMENTS = 1 << 20
"""Logits whose exponentials are held at a time. Of more, memory would cost more than the exponentials."""
LEAST_LOGPROB = -9999.0
"""Reported in place of minus infinity, which JSON does not have."""


def sample_with_logprobs(
    sampler: BatchSampler, logits: torch.Tensor, draws: Sequence[Draw | None], alternatives: Sequence[int | None]
) -> tuple[list[Sampled], list[TokenLogprob | None]]:
    """The token of each row, and its log-probability if the row's number of `alternatives` is not none.

    `logits` `[rows, vocabulary]` may be overwritten. A row without a token has no log-probability.
    """
    logprobs: list[TokenLogprob | None] = [None] * len(draws)
    if all(count is None for count in alternatives):
        return sampler.sample(logits, draws), logprobs
    sampled = sampler.sample(logits, draws, keeps_logits=True)
    tokens = {
        row: token for row, token in enumerate(sampled) if isinstance(token, int) and alternatives[row] is not None
    }
    if tokens:
        asked = logits if len(tokens) == len(logits) else logits[[*tokens]]
        found = token_logprobs(asked, [*tokens.values()], [alternatives[row] or 0 for row in tokens])
        for row, logprob in zip(tokens, found, strict=True):
            logprobs[row] = logprob
    return sampled, logprobs


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of each row's token, with so many of the row's likeliest tokens, most likely first.

    `logits` `[rows, vocabulary]` are the model's own. Waits for the device.
    """
    logits = logits.float()
    values, ids = greatest(logits, min(max(1, *alternatives), logits.shape[1]))
    total = values[:, :1] - _greatest_logprob(logits, ids[:, :1])
    index = torch.as_tensor(tokens, device=logits.device)[:, None]
    chosen = (logits.gather(1, index) - total)[:, 0].tolist()
    return [
        TokenLogprob(
            token_id=token,
            logprob=max(logprob, LEAST_LOGPROB),
            top=tuple((id_, max(value, LEAST_LOGPROB)) for id_, value in zip(ids[:count], values[:count], strict=True)),
        )
        for token, logprob, ids, values, count in zip(
            tokens, chosen, ids.tolist(), (values - total).tolist(), alternatives, strict=True
        )
    ]


def _greatest_logprob(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`[rows, 1]`: the log-probability of the largest logit of each row, which has the token id `ids` `[rows, 1]`.

    A soft-max in parts that a cache holds takes half the time of `logsumexp`.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    memory = torch.empty((min(rows, len(logits)), logits.shape[1]), device=logits.device)
    parts = [
        torch.softmax(part, -1, out=memory[: len(part)]).gather(1, places)
        for part, places in zip(torch.split(logits, rows), torch.split(ids, rows), strict=True)
    ]
    return torch.cat(parts).log_()
