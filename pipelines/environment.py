"""The Flink environment that every job of ours needs, and what it cannot run with."""

from pyflink.common import Configuration
from pyflink.datastream import StreamExecutionEnvironment
from pyflink.java_gateway import get_gateway

from core.errors import UserError
from operators.config import Batching, JobConfig
from pipelines.connectors import connector_jars

MAX_PARALLELISM = 128
"""Number of key groups. Fixed, as it decides which key leads to which subtask."""

_SETTINGS = {
    # Elements and timers wait for the end of a bundle, and each bundle costs milliseconds of CPU time. A bundle may end
    # once this time has passed since the end of the one before it. So it is short under light load, and under heavy
    # load it takes what came while the one before it was computed. A second Python operator in the same task would
    # spoil that: the time that one spends on a bundle would end the other's after its first element.
    "python.fn-execution.bundle.time": "2",
    # Managed memory is what lets the Python operators of a slot share one worker process.
    "python.fn-execution.memory.managed": "true",
    "execution.buffer-timeout.interval": "0 ms",
    # Barriers overtake what queues before a busy engine; aligned ones would wait for all of it.
    "execution.checkpointing.unaligned.enabled": "true",
    # A job that was cancelled, or whose cluster died, can go on from the last one.
    "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
    # A restart mends no full disk: it would only ask again what was answered since the last checkpoint.
    "execution.checkpointing.tolerable-failed-checkpoints": "100",
    "restart-strategy.exponential-delay.initial-backoff": "1 s",
    "restart-strategy.exponential-delay.max-backoff": "30 s",
    # Longer than a slot takes to load: a job that fails each time it has loaded must not be restarted for ever.
    "restart-strategy.exponential-delay.reset-backoff-threshold": "1 h",
}


def make_environment(config: JobConfig) -> StreamExecutionEnvironment:
    """Raises `UserError` for a cluster set to thread mode, which PyFlink 2 cannot run these jobs in."""
    settings = Configuration()
    for key, value in _SETTINGS.items():
        settings.set_string(key, value)
    settings.set_string("python.fn-execution.bundle.size", str(bundle_records(config)))
    settings.set_string("execution.checkpointing.interval", f"{config.checkpoint_interval_ms} ms")
    restarts = config.supervision.job_restarts
    settings.set_string("restart-strategy.type", "exponential-delay" if restarts else "none")
    if restarts:
        settings.set_string("restart-strategy.exponential-delay.attempts-before-reset-backoff", str(restarts))
    env = StreamExecutionEnvironment.get_execution_environment(settings)
    mode = env._j_stream_execution_environment.getConfiguration().toMap().get("python.execution-mode")
    if mode not in (None, "process"):
        raise UserError(f"python.execution-mode: {mode!r} is not supported; set it to process")
    if config.ship_connector:
        env.add_jars(*connector_jars())
    env.set_parallelism(config.parallelism)
    env.set_max_parallelism(MAX_PARALLELISM)
    return env


def bundle_records(config: JobConfig) -> int:
    """Maximum number of elements in a bundle.

    Where the slot has all that it may have, each element of a bundle waits for an answer. Until the bundle ends no
    checkpoint passes and no answer leaves. Half the rows of the engine are answered in half the time of a request.
    A micro-batch is computed while its last request is taken in.
    """
    if config.batching.batching is Batching.MICRO:
        return 1
    return max(1, config.engine.max_running // 2)


def subtask_of_key(key: int, parallelism: int) -> int:
    """Flink's own rule: the subtask that a key is processed by. PyFlink wraps every key in a row, and hashes that."""
    jvm = get_gateway().jvm
    row = jvm.org.apache.flink.types.Row(1)
    row.setField(0, key)
    assignment = jvm.org.apache.flink.runtime.state.KeyGroupRangeAssignment
    return int(assignment.assignKeyToParallelOperator(row, MAX_PARALLELISM, parallelism))
