"""The load as requests of blocks, from a trace or generated. Each run iterates it again, one request at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from cache.keys import KeySchema
from cache.protocol import ChunkShape, ModelIdentity
from core.errors import UserError
from experiments.lab.config import LabConfig, LoadFormat
from experiments.lab.keys import BLOCK_SHAPE
from workloads.block_trace import BlockRequest, TraceFormat, read_blocks
from workloads.bursts import bursts
from workloads.config import WorkloadConfig, trace_file
from workloads.mooncake_trace import TraceForm
from workloads.phases import PhasesWorkload

Load = Callable[[], Iterable[BlockRequest]]
"""Each call gives the same requests from the beginning."""


def make_load(config: LabConfig, left_out: Counter[str] | None = None) -> Load:
    """Return the load of `config`. Raises `UserError` if it has no requests or its options contradict each other.

    `left_out` gets the number of rows that the latest reading of the trace left out, by reason.
    """
    if config.format is LoadFormat.PHASES:
        workload = config.workload.model_copy(update={"workload": "phases"})
        return lambda: phases_blocks(workload, config.chunk_tokens)
    if config.format is LoadFormat.BURSTS:
        return lambda: bursts(config.workload.requests, config.workload.seed)
    trace = trace_file(config.workload)
    replay, mooncake = config.workload.replay, config.workload.mooncake
    trace_format = TraceFormat(config.format)

    def load() -> Iterator[BlockRequest]:
        if left_out is not None:
            left_out.clear()
        return read_blocks(
            trace,
            trace_format,
            time_scale=replay.time_scale,
            block_tokens=mooncake.trace_block_tokens,
            form=TraceForm(mooncake.trace_block_tokens, mooncake.trace_time_unit),
            failed_calls=config.workload.burstgpt.failed_calls,
            bad_rows=replay.bad_rows,
            counts=left_out,
        )

    if next(iter(load()), None) is None:
        raise UserError(f"--trace: {trace} has no usable request; give another trace")
    return load


def phases_blocks(config: WorkloadConfig, chunk_tokens: int) -> Iterator[BlockRequest]:
    """The phases load as the default model's cache sees it: one byte is one token, and only full chunks are blocks."""
    shape = ChunkShape(
        layers=BLOCK_SHAPE.layers,
        kv_heads=BLOCK_SHAPE.kv_heads,
        chunk_tokens=chunk_tokens,
        head_dim=BLOCK_SHAPE.head_dim,
        dtype=BLOCK_SHAPE.dtype,
    )
    schema = KeySchema(ModelIdentity("policy lab", "bytes", ""), shape)
    for timed in PhasesWorkload(config):
        tokens = (timed.prompt or "").encode()
        blocks = tuple(int.from_bytes(key[:8], "little") >> 1 for key in schema.of(list(tokens)).hashes)
        yield BlockRequest(timed.at_ms, blocks, len(tokens), chunk_tokens)
