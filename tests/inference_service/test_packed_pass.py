"""Packed passes over pieces of several sequences: which models take them, and that a wrong result is not used."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from engine_helpers import CHUNK, LAYERS_OF_TWO, MAX_LEN, load_tiny, save_tiny, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_service import support
from inference_service.active_sequence import Piece, leading_rows
from inference_service.attention_interface import EAGER, SDPA
from inference_service.model import LoadedModel
from inference_service.runner import Runner
from inference_service.support import with_packing

TAKE_IT = {
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "llama": hf.LlamaConfig,
    "mistral": hf.MistralConfig,
    "olmo2": hf.Olmo2Config,
}


@pytest.mark.parametrize("make", TAKE_IT.values(), ids=TAKE_IT.keys())
def test_usual_models_take_packed_passes(make: Any, tmp_path: Path) -> None:
    model = load_tiny(save_tiny(tmp_path / "usual", make(**LAYERS_OF_TWO)))
    assert model.packs
    assert model.model.config._attn_implementation == SDPA


def test_a_model_that_sdpa_cannot_compute_packs_with_its_eager_attention(tmp_path: Path) -> None:
    """Gemma 2 has softcapped scores; gpt-oss has attention sinks."""
    softcap = hf.Gemma2Config(**LAYERS_OF_TWO, head_dim=16, sliding_window=MAX_LEN, attn_logit_softcapping=1.0)
    model = load_tiny(save_tiny(tmp_path / "softcap", softcap))
    assert model.packs
    assert model.model.config._attn_implementation == EAGER


def test_a_model_without_an_attention_interface_takes_a_pass_a_piece(tmp_path: Path) -> None:
    config = hf.GPTJConfig(
        vocab_size=258, n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8, eos_token_id=256
    )
    model = load_tiny(save_tiny(tmp_path / "own", config))
    assert not model.packs
    assert model.batches
    assert model.model.config._attn_implementation == "eager"


class OthersSeen(Runner):
    """A wrong attention: its last piece attends to the row of the first."""

    def _packed(self, pieces: Any, rows: int) -> torch.Tensor:
        if len(pieces) > 1:
            last = pieces[-1]
            self.pool.move_row(0, last.row, last.start)
        return super()._packed(pieces, rows)


class NoPackedPass(Runner):
    def _packed(self, pieces: Any, rows: int) -> torch.Tensor:
        raise TypeError("its logits are of one token only")


@pytest.mark.parametrize("runner", [OthersSeen, NoPackedPass])
def test_a_model_whose_packed_pass_is_wrong_is_served_without(
    runner: type[Runner], tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "Runner", runner)
    model = load_tiny(tiny_paths["qwen2"])
    assert not model.packs
    assert model.model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    assert with_packing(model).packs


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_packed_pass_gives_what_each_piece_gives_alone(
    tiny_models: dict[str, LoadedModel], data: st.DataObject
) -> None:
    """Any rows, any lengths before, single tokens first or in between."""
    model = tiny_models["qwen2"]
    runner = model.make_runner(4, CHUNK)
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    pieces = []
    for row in chosen:
        start, count = data.draw(st.integers(0, 30)), data.draw(st.sampled_from([1, 1, 2, 9]))
        tokens = tokens_of(row, start + count)
        if start:
            runner.forward([Piece(row, 0, tokens[:start])])
        pieces.append(Piece(row, start, tokens[start:]))
    together = runner.forward(pieces)
    alone = torch.cat([runner.forward([piece]) for piece in pieces])
    assert together.shape == (len(pieces), model.vocab_size)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_pass_calls_the_model_once(qwen2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = qwen2.make_runner(4, CHUNK)
    runner.forward([Piece(row, 0, tokens_of(row, 5 + row)) for row in range(4)])
    calls: list[torch.Size] = []
    original = qwen2.model.forward

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        calls.append(input_ids.shape)
        return original(input_ids=input_ids, **arguments)

    monkeypatch.setattr(qwen2.model, "forward", counted)
    pieces = [Piece(0, 5, [1]), Piece(1, 6, [2]), Piece(3, 0, tokens_of(9, 11)), Piece(2, 7, [3, 4])]
    assert leading_rows(pieces) == 2
    runner.forward(pieces)
    assert calls == [(1, 15)]
