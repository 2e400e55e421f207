"""The pool against plain tensors, one a row: what is written, returned, copied and moved."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.protocol import ChunkShape
from inference_service.kv_pool import KVPool

ROWS, MAX_LEN, CHUNK = 4, 12, 3
SHAPE = ChunkShape(layers=2, kv_heads=2, chunk_tokens=CHUNK, head_dim=3, dtype=torch.float32)
CPU = torch.device("cpu")


class PlainRows:
    """What each row should hold: `[layers, 2, kv_heads, MAX_LEN, head_dim]`."""

    def __init__(self) -> None:
        size = (SHAPE.layers, 2, SHAPE.kv_heads, MAX_LEN, SHAPE.head_dim)
        self.rows = [torch.zeros(size) for _ in range(ROWS)]


def numbered(first: int, *size: int) -> torch.Tensor:
    count = int(torch.Size(size).numel())
    return torch.arange(first, first + count, dtype=torch.float32).reshape(size)


def new_tokens(step: int, layer: int, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that occur nowhere else."""
    size = (batch, SHAPE.kv_heads, tokens, SHAPE.head_dim)
    first = 10_000 * (1 + step) + 1000 * layer
    return numbered(first, *size), numbered(first + 500, *size)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN - 1), st.integers(1, MAX_LEN)),
        st.tuples(st.just("decode"), st.lists(st.integers(0, MAX_LEN - 1), min_size=1, max_size=ROWS)),
        st.tuples(st.just("load"), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN // CHUNK - 1)),
        st.tuples(st.just("move"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN)),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(operations=operations)
def test_a_row_holds_what_was_written_to_it(operations: list[tuple[Any, ...]]) -> None:
    pool, plain = KVPool(SHAPE, ROWS, MAX_LEN, CPU), PlainRows()
    for step, (name, *arguments) in enumerate(operations):
        if name == "prefill":
            row, start, tokens = arguments
            tokens = min(tokens, MAX_LEN - start)
            pool.begin_prefill(row, start, tokens)
            assert (pool.get_seq_length(), pool.get_mask_sizes(tokens)) == (start, (start + tokens, 0))
            for layer in range(SHAPE.layers):
                pair = new_tokens(step, layer, 1, tokens)
                found = pool.update(*pair, layer)
                for kind in (0, 1):
                    plain.rows[row][layer, kind, :, start : start + tokens] = pair[kind][0]
                    assert torch.equal(found[kind], plain.rows[row][layer, kind, :, : start + tokens][None])
        elif name == "decode":
            (positions,) = arguments
            length = max(positions) + 1
            pool.begin_decode(torch.tensor(positions), length)
            assert (pool.get_seq_length(), pool.get_mask_sizes(1)) == (length - 1, (length, 0))
            for layer in range(SHAPE.layers):
                pair = new_tokens(step, layer, len(positions), 1)
                found = pool.update(*pair, layer)
                for kind in (0, 1):
                    for row, position in enumerate(positions):
                        plain.rows[row][layer, kind, :, position] = pair[kind][row, :, 0]
                    rows = torch.stack([plain.rows[row][layer, kind, :, :length] for row in range(len(positions))])
                    assert torch.equal(found[kind], rows)
        elif name == "load":
            row, index = arguments
            chunk = numbered(-10_000 * (1 + step), *SHAPE.size)
            pool.load_chunk(row, index, chunk)
            plain.rows[row][:, :, :, index * CHUNK : (index + 1) * CHUNK] = chunk
        else:
            source, target, tokens = arguments
            pool.move_row(source, target, tokens)
            plain.rows[target][:, :, :, :tokens] = plain.rows[source][:, :, :, :tokens].clone()
        check_all(pool, plain)


def check_all(pool: KVPool, plain: PlainRows) -> None:
    out = torch.empty(SHAPE.size)
    for row in range(ROWS):
        for index in range(MAX_LEN // CHUNK):
            pool.read_chunk(row, index, out)
            assert torch.equal(out, plain.rows[row][:, :, :, index * CHUNK : (index + 1) * CHUNK])


def test_what_comes_back_is_a_view() -> None:
    """A copy of all keys and values in every layer of every step is what the pool is there to avoid."""
    pool = KVPool(SHAPE, ROWS, MAX_LEN, CPU)
    memory = pool._memory.untyped_storage().data_ptr()
    pool.begin_prefill(2, 0, 4)
    assert all(view.untyped_storage().data_ptr() == memory for view in pool.update(*new_tokens(0, 0, 1, 4), 0))
    pool.begin_decode(torch.tensor([1, 5]), 6)
    assert all(view.untyped_storage().data_ptr() == memory for view in pool.update(*new_tokens(1, 0, 2, 1), 0))


def test_a_chunk_is_a_copy() -> None:
    pool = KVPool(SHAPE, ROWS, MAX_LEN, CPU)
    out, chunk = torch.empty(SHAPE.size), numbered(0, *SHAPE.size)
    pool.load_chunk(1, 2, chunk)
    pool.read_chunk(1, 2, out)
    chunk.zero_()
    pool.load_chunk(1, 2, chunk)
    assert torch.equal(out, numbered(0, *SHAPE.size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_size_is_told_in_bytes(dtype: torch.dtype) -> None:
    shape = ChunkShape(SHAPE.layers, SHAPE.kv_heads, CHUNK, SHAPE.head_dim, dtype)
    pool = KVPool(shape, ROWS, MAX_LEN, CPU)
    assert pool.size_bytes == ROWS * (MAX_LEN // CHUNK) * shape.size_bytes
    assert len(pool.layers) == SHAPE.layers
