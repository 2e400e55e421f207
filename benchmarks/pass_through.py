"""The job's graph with functions that only pass records on: the cost of Kafka, Flink and PyFlink alone.

It is submitted as the job is, with the same options:  flink run -py benchmarks/pass_through.py ...
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pyflink.common import Row
from pyflink.datastream import KeyedProcessFunction, ProcessFunction, RuntimeContext

from core.errors import exit_on_user_error
from operators.config import JobConfig
from operators.envelope import Ready
from operators.flink.rows import READY, WARM_UP
from pipelines.job import Functions, run


class PassToSlot(ProcessFunction):
    """Deals records out to the slots by offset, without parsing them."""

    def __init__(self, config: JobConfig, keys: Sequence[int]) -> None:
        self._keys = keys

    def process_element(self, value: Row, ctx: ProcessFunction.Context) -> Iterator[Any]:
        raw, partition, offset = value
        if partition == WARM_UP:
            yield Row(self._keys[offset], b"")
        else:
            yield Row(self._keys[offset % len(self._keys)], bytes(raw))


class PassOn(KeyedProcessFunction):
    """Writes each record to the responses topic as it is."""

    def __init__(self, config: JobConfig) -> None:
        pass

    def open(self, runtime_context: RuntimeContext) -> None:
        self._slot = runtime_context.get_index_of_this_subtask()

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        if value:
            yield Row("", value.decode())
        else:
            ready = Ready(
                slot=self._slot,
                device="none",
                engine="pass-through",
                model="none",
                dtype="none",
                threads=1,
                chunk_bytes=0,
                load_s=0.0,
            )
            yield READY, Row(f"slot-{self._slot}", ready.model_dump_json())


def main() -> None:
    run("pass_through.py", (__doc__ or "").splitlines()[0], {}, Functions(PassToSlot, PassOn))


if __name__ == "__main__":
    exit_on_user_error(main)
