"""`generate` on a group of prompts of different lengths: padded on the left, answered together, cut one by one."""

from collections.abc import Collection, Sequence

import torch

from inference_service.model import LoadedModel


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[prompts, longest]`: every prompt ends in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def cut(answer: Sequence[int], limit: int, eos_ids: Collection[int]) -> list[int]:
    """What was asked for: at most `limit` tokens, and none from an end-of-sequence token on."""
    asked = list(answer[:limit])
    end = next((index for index, token in enumerate(asked) if token in eos_ids), len(asked))
    return asked[:end]


def answer_in_no_time(model: LoadedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """One token each, in place of `answer_together`: what is left is what surrounds the model."""
    return [[0] for _ in prompts]


@torch.inference_mode()
def answer_together(model: LoadedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """Greedy answers of one call of `generate`, which runs until the longest of them is whole."""
    pad_id = model.tokenizer.pad_token_id
    pad_id = min(model.eos_token_ids, default=0) if pad_id is None else pad_id
    ids, mask = pad_left(prompts, pad_id)
    made = model.model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=max(limits),
        pad_token_id=pad_id,
    )
    answers = made[:, ids.shape[1] :].tolist()
    return [cut(answer, limit, model.eos_token_ids) for answer, limit in zip(answers, limits, strict=True)]
