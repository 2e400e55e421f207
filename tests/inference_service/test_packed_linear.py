"""Packed linear layers equal the plain ones, and only layers that gain from it are packed."""

from pathlib import Path

import pytest
import torch
import transformers

from inference_service.config import EngineConfig
from inference_service.model import load_model
from inference_service.packed_linear import PackedLinear, pack_linears
from inference_service.transformers_engine import load_checked_model
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, plain_answer, save_tiny, tokens_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (8,), (300,), (1, 7), (4, 1), (2, 3, 5)])
@torch.inference_mode()
def test_the_product_is_the_same_but_for_rounding(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 160, bias=bias).requires_grad_(False)
    given = torch.randn(*rows, 96)
    found = PackedLinear(linear)(given)
    assert found.shape == (*rows, 160)
    torch.testing.assert_close(found, linear(given), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_that_do_not_stand_together_are_taken_as_they_are() -> None:
    linear = torch.nn.Linear(16, 8).requires_grad_(False)
    given = torch.randn(16, 5).t()
    torch.testing.assert_close(PackedLinear(linear)(given), linear(given), rtol=1e-5, atol=1e-5)


class Adapted(torch.nn.Linear):
    """A layer with another computation."""


def test_other_layers_and_types_stay_as_they_are() -> None:
    model = torch.nn.Sequential(
        Adapted(4, 4), torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.nn.Sequential(torch.nn.Linear(4, 4))
    )
    assert pack_linears(model) == 1
    assert [type(layer) for layer in model[:2]] == [Adapted, torch.nn.Linear]
    assert type(model[2][0]) is PackedLinear
    assert pack_linears(model) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_answers_as_the_plain_one_and_has_its_size_and_identity(tmp_path: Path, tied: bool) -> None:
    path = save_tiny(tmp_path / "tiny", transformers.Qwen2Config(**LAYERS_OF_TWO, tie_word_embeddings=tied))
    config = EngineConfig(model=str(path), device="cpu", max_model_len=64)
    plain, packed = load_model(config), load_checked_model(config)
    assert type(packed.model.lm_head) is PackedLinear
    assert packed.identity == plain.identity
    # A layer that shares its weights with the embedding has a packed copy of its own.
    shared = packed.model.lm_head.weight.numel() if tied else 0
    sizes = [sum(one.numel() for one in model.model.parameters()) for model in (plain, packed)]
    assert sizes[1] == sizes[0] + shared
    for seed, length in ((1, 3), (2, 20), (3, 40)):
        prompt = tokens_of(seed, length)
        assert plain_answer(packed, prompt, 12) == plain_answer(plain, prompt, 12)
