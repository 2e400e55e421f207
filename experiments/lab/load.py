"""The load as requests of blocks, from a trace or made: iterated anew for every run, one in memory at a time."""

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
"""Each call gives the same requests from the first on."""


def make_load(config: LabConfig, left_out: Counter[str] | None = None) -> Load:
    """The load that `config` states. Raises `UserError` for one without requests or with options that contradict.

    `left_out`: what the latest reading of the trace has left out, by reason.
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
        raise UserError(f"--trace: {trace} has no request that counts; give another trace")
    return load


def phases_blocks(config: WorkloadConfig, chunk_tokens: int) -> Iterator[BlockRequest]:
    """The phases load as the default model's cache sees it: a byte is a token, and only full chunks are blocks."""
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
