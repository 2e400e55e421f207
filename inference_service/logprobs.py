"""Log-probabilities of sampled tokens and of the likeliest alternatives, before penalties, filters and temperature."""

from collections.abc import Sequence

import torch

from core.records import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Reported in place of minus infinity, which JSON does not have."""


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of each row's token, with so many of the row's likeliest tokens, most likely first.

    `logits` `[rows, vocabulary]` are the model's own. Waits for the device.
    """
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    index = torch.as_tensor(tokens, device=logits.device)[:, None]
    chosen = (logits.gather(1, index) - total)[:, 0].tolist()
    top = logits.topk(min(max(alternatives), logits.shape[1]))
    top_ids, top_values = top.indices.tolist(), (top.values - total).tolist()
    return [
        TokenLogprob(
            token_id=token,
            logprob=max(logprob, LEAST_LOGPROB),
            top=tuple((id_, max(value, LEAST_LOGPROB)) for id_, value in zip(ids[:count], values[:count], strict=True)),
        )
        for token, logprob, ids, values, count in zip(tokens, chosen, top_ids, top_values, alternatives, strict=True)
    ]
