"""The pool compared with one plain tensor per row: writing, reading, copying and moving."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.protocol import ChunkShape
from inference_service.chunk_stage import ChunkStage
from inference_service.kv_pool import KVPool

ROWS, MAX_LEN, CHUNK = 4, 12, 3
SHAPE = ChunkShape(layers=2, kv_heads=2, chunk_tokens=CHUNK, head_dim=3, dtype=torch.float32)
CPU = torch.device("cpu")


class PlainRows:
    """The expected content of each row: `[layers, 2, kv_heads, MAX_LEN, head_dim]`."""

    def __init__(self) -> None:
        size = (SHAPE.layers, 2, SHAPE.kv_heads, MAX_LEN, SHAPE.head_dim)
        self.rows = [torch.zeros(size) for _ in range(ROWS)]


def numbered(first: int, *size: int) -> torch.Tensor:
    count = int(torch.Size(size).numel())
    return torch.arange(first, first + count, dtype=torch.float32).reshape(size)


def new_tokens(step: int, layer: int, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unique keys and values."""
    size = (batch, SHAPE.kv_heads, tokens, SHAPE.head_dim)
    first = 10_000 * (1 + step) + 1000 * layer
    return numbered(first, *size), numbered(first + 500, *size)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN - 1), st.integers(1, MAX_LEN)),
        st.tuples(st.just("decode"), st.lists(st.integers(0, MAX_LEN - 1), min_size=1, max_size=ROWS)),
        st.tuples(st.just("load"), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN // CHUNK - 1)),
        st.tuples(st.just("load many"), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN // CHUNK)),
        st.tuples(st.just("swap"), st.permutations(range(ROWS)), st.integers(0, MAX_LEN), st.integers(0, MAX_LEN)),
        st.tuples(st.just("move"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), st.integers(0, MAX_LEN)),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(operations=operations, staged_chunks=st.sampled_from([0, 1, 2, 3, 100]))
def test_a_row_holds_what_was_written_to_it(operations: list[tuple[Any, ...]], staged_chunks: int) -> None:
    """With `staged_chunks`, chunks move as to and from a GPU, this many at a time."""
    pool, plain = KVPool(SHAPE, ROWS, MAX_LEN, CPU), PlainRows()
    if staged_chunks:
        pool._stage = ChunkStage(SHAPE, CPU, staged_chunks * SHAPE.size_bytes)
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
        else:
            copy_chunks_and_rows(pool, plain, step, name, arguments)
        check_all(pool, plain)


def copy_chunks_and_rows(pool: KVPool, plain: PlainRows, step: int, name: str, arguments: list[Any]) -> None:
    if name == "load":
        row, index = arguments
        chunk = numbered(-10_000 * (1 + step), *SHAPE.size)
        pool.load_chunk(row, index, chunk)
        plain.rows[row][:, :, :, index * CHUNK : (index + 1) * CHUNK] = chunk
    elif name == "load many":
        row, count = arguments
        chunks = [numbered(-10_000 * (1 + step) + 500 * index, *SHAPE.size) for index in range(count)]
        pool.load_chunks(row, chunks)
        for index, chunk in enumerate(chunks):
            plain.rows[row][:, :, :, index * CHUNK : (index + 1) * CHUNK] = chunk
            chunk.zero_()
    elif name == "swap":
        (one, other, *_), *tokens = arguments
        pool.swap_rows(one, tokens[0], other, tokens[1])
        kept = plain.rows[one].clone()
        plain.rows[one][:, :, :, : tokens[1]] = plain.rows[other][:, :, :, : tokens[1]]
        plain.rows[other][:, :, :, : tokens[0]] = kept[:, :, :, : tokens[0]]
    else:
        source, target, tokens = arguments
        pool.move_row(source, target, tokens)
        plain.rows[target][:, :, :, :tokens] = plain.rows[source][:, :, :, :tokens].clone()


def check_all(pool: KVPool, plain: PlainRows) -> None:
    out = torch.empty(SHAPE.size)
    for row in range(ROWS):
        read = pool.chunk_reader(row, MAX_LEN)
        for index in range(MAX_LEN // CHUNK):
            read(index, out)
            assert torch.equal(out, plain.rows[row][:, :, :, index * CHUNK : (index + 1) * CHUNK])


def test_what_comes_back_is_a_view() -> None:
    """The pool exists to avoid a copy of all keys and values in every layer of every step."""
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


def test_a_stage_reads_from_the_first_chunk_that_it_lacks() -> None:
    """The first chunks of a prompt are often stored already. Each transfer has as many chunks as the stage holds."""
    pool = KVPool(SHAPE, ROWS, MAX_LEN, CPU)
    spans: list[tuple[int, int]] = []

    def watched(first: int, count: int) -> torch.Tensor:
        spans.append((first, count))
        return pool._spans(0, first, count)

    count = MAX_LEN // CHUNK
    chunks = [numbered(500 * index, *SHAPE.size) for index in range(count)]
    pool.load_chunks(0, chunks)
    stage = ChunkStage(SHAPE, CPU, 2 * SHAPE.size_bytes)
    read, out = stage.reader(count, watched), torch.empty(SHAPE.size)
    for index in range(1, count):
        read(index, out)
        assert torch.equal(out, chunks[index])
    assert spans == [(first, min(2, count - first)) for first in range(1, count, 2)]
