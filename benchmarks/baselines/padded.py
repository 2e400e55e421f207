"""`generate` on prompts of different lengths: pad them on the left, answer them together, cut each answer."""

from collections.abc import Collection, Sequence

import torch

from inference_service.model import LoadedModel


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both `[prompts, longest]`. Every prompt ends in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def cut(answer: Sequence[int], limit: int, eos_ids: Collection[int]) -> list[int]:
    """Cut the answer to `limit` tokens, and before its first end-of-sequence token."""
    asked = list(answer[:limit])
    end = next((index for index, token in enumerate(asked) if token in eos_ids), len(asked))
    return asked[:end]


def answer_in_no_time(model: LoadedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """Return one token per prompt without the model, in place of `answer_together`."""
    return [[0] for _ in prompts]


@torch.inference_mode()
def answer_together(model: LoadedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """Return greedy answers of one call of `generate`, which runs until the longest is complete."""
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
