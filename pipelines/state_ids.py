"""Uids for the state of every operator, so that a savepoint can be resumed at another parallelism.

Without a uid Flink derives one from the graph around the operator. The connectors of the Table API accept no uid, and
their graph depends on the parallelism.
"""

import re
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pyflink.datastream import StreamExecutionEnvironment

WARM_UP_SOURCE = "Values"
NUMBER = re.compile(r"\[\d+\]$")


def name_states(env: StreamExecutionEnvironment) -> None:
    """Give a uid to every operator without one. The uids do not depend on the parallelism."""
    numbers: Counter[str] = Counter()
    # A finished source does not run again if its state is found, but the warm-up rows must come at each start.
    warm_up = f"warm-up-{uuid.uuid4().hex}"
    for operator in _operators(env):
        name = NUMBER.sub("", str(operator.getName()))
        if _is_warm_up(operator):
            name = f"{warm_up}-{name}"
        if operator.getUid() is None:
            numbers[name] += 1
            operator.setUid(f"{name}-{numbers[name]}")


def _operators(env: StreamExecutionEnvironment) -> Iterator[Any]:
    """Yield all transformations of the graph, each once, after its inputs."""
    seen: set[int] = set()

    def walk(operator: Any) -> Iterator[Any]:
        if operator.getId() not in seen:
            seen.add(operator.getId())
            for before in operator.getInputs():
                yield from walk(before)
            yield operator

    for last in env._j_stream_execution_environment.getTransformations():
        yield from walk(last)


def _is_warm_up(operator: Any) -> bool:
    inputs = operator.getInputs()
    return operator.getName().startswith(WARM_UP_SOURCE) or (len(inputs) > 0 and all(map(_is_warm_up, inputs)))
