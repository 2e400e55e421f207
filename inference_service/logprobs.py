"""Log-probabilities of sampled tokens and of the likeliest alternatives, before penalties, filters and temperature."""

from collections.abc import Sequence

import torch

from core.records import TokenLogprob
from inference_service.sampling import greatest

CHUNK_ELEMENTS = 1 << 20
"""Logits whose exponentials are held at a time. Of more, memory would cost more than the exponentials."""
LEAST_LOGPROB = -9999.0
"""Reported in place of minus infinity, which JSON does not have."""


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of each row's token, with so many of the row's likeliest tokens, most likely first.

    `logits` `[rows, vocabulary]` are the model's own. Waits for the device.
    """
    logits = logits.float()
    total = _log_mass(logits)
    index = torch.as_tensor(tokens, device=logits.device)[:, None]
    chosen = (logits.gather(1, index) - total)[:, 0].tolist()
    count = min(max(alternatives), logits.shape[1])
    top_ids: list[list[int]] = [[]] * len(logits)
    top_values: list[list[float]] = [[]] * len(logits)
    if count:
        values, ids = greatest(logits, count)
        top_ids, top_values = ids.tolist(), (values - total).tolist()
    return [
        TokenLogprob(
            token_id=token,
            logprob=max(logprob, LEAST_LOGPROB),
            top=tuple((id_, max(value, LEAST_LOGPROB)) for id_, value in zip(ids[:count], values[:count], strict=True)),
        )
        for token, logprob, ids, values, count in zip(tokens, chosen, top_ids, top_values, alternatives, strict=True)
    ]


def _log_mass(logits: torch.Tensor) -> torch.Tensor:
    """`[rows, 1]`: the logarithm of the sum of the exponentials of each row. On a CPU half the time of `logsumexp`."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    memory = torch.empty((min(rows, len(logits)), logits.shape[1]), device=logits.device)
    parts = []
    for part in torch.split(logits, rows):
        shift = part.amax(-1, keepdim=True)
        shifted = torch.sub(part, shift, out=memory[: len(part)])
        parts.append(shifted.exp_().sum(-1, keepdim=True).log_().add_(shift))
    return torch.cat(parts)
