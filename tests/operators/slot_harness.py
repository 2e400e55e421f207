"""The harness for inference functions: elements have the form in which the job sends them."""

from collections.abc import Callable
from typing import Any

from pyflink.datastream import KeyedProcessFunction
from pyflink.fn_execution.beam.beam_coders import FlinkCoder
from pyflink.fn_execution.coders import from_type_info

from core.clock import ManualClock
from operators.envelope import Envelope, WarmUp
from operators.flink.rows import KEY_VALUE, KEYED, element_row
from tests.operators.flink.keyed_state import Key
from tests.operators.operator_harness import OperatorHarness, Output

_KEYED_CODER = FlinkCoder(from_type_info(KEYED))


class SlotHarness(OperatorHarness):
    """Packs elements as decode does, passes them through the row's type, and delivers them without the key."""

    def __init__(
        self,
        make: Callable[[], KeyedProcessFunction],
        clock: ManualClock | None = None,
        *,
        parallelism: int = 1,
        subtask: int = 0,
    ) -> None:
        super().__init__(make, clock, parallelism=parallelism, subtask=subtask, output_type=KEY_VALUE)

    def process(self, value: Envelope | WarmUp, key: Key = None, timestamp: int | None = None) -> list[Output]:
        assert key is not None, "the inference functions are keyed"
        return super().process(packed(value, key), key, timestamp)


def packed(element: Envelope | WarmUp, key: int = 0) -> Any:
    """The form in which an inference function gets an element."""
    key_there, found = _KEYED_CODER.decode(_KEYED_CODER.encode(element_row(key, element)))
    assert key_there == key
    return found
