"""The Flink environment of every job, and checks of the cluster's configuration."""

from pyflink.common import Configuration
from pyflink.datastream import StreamExecutionEnvironment
from pyflink.java_gateway import get_gateway

from core.errors import UserError
from operators.config import Batching, JobConfig
from pipelines.connectors import connector_jars

MAX_PARALLELISM = 128
"""Number of key groups. It is fixed, because it decides which subtask processes a key."""

_SETTINGS = {
    # Elements and timers wait for the end of a bundle, and each bundle costs milliseconds of CPU time. A bundle may end
    # once this time has passed since the end of the one before it. So it is short under light load, and under heavy
    # load it takes what came while the one before it was computed. A second Python operator in the same task would
    # spoil that: the time that one spends on a bundle would end the other's after its first element.
    "python.fn-execution.bundle.time": "2",
    # Managed memory is what lets the Python operators of a slot share one worker process.
    "python.fn-execution.memory.managed": "true",
    "execution.buffer-timeout.interval": "0 ms",
    # Unaligned barriers overtake the queue before a busy engine; aligned ones would wait for all of it.
    "execution.checkpointing.unaligned.enabled": "true",
    # A job that was cancelled, or whose cluster died, can resume from its last checkpoint.
    "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
    # A restart does not help against a full disk: it would only repeat work since the last checkpoint.
    "execution.checkpointing.tolerable-failed-checkpoints": "100",
    "restart-strategy.exponential-delay.initial-backoff": "1 s",
    "restart-strategy.exponential-delay.max-backoff": "30 s",
    # Longer than a slot takes to load, so that a job that fails after each load is not restarted for ever.
    "restart-strategy.exponential-delay.reset-backoff-threshold": "1 h",
}


def make_environment(config: JobConfig) -> StreamExecutionEnvironment:
    """Return the environment. Raises `UserError` for a cluster in thread mode, in which PyFlink 2 cannot run jobs."""
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

    If a slot is full, each element of a bundle waits for an answer. No checkpoint passes and no answer leaves before
    the bundle ends. Half the rows of the engine are answered in half the time of a request, so this is the limit. With
    micro-batches it is one, because a batch is computed while its last request is taken in.
    """
    if config.batching.batching is Batching.MICRO:
        return 1
    return max(1, config.engine.max_running // 2)


def subtask_of_key(key: int, parallelism: int) -> int:
    """Return the subtask that processes a key, by Flink's rule. PyFlink wraps every key in a row and hashes the row."""
    jvm = get_gateway().jvm
    row = jvm.org.apache.flink.types.Row(1)
    row.setField(0, key)
    assignment = jvm.org.apache.flink.runtime.state.KeyGroupRangeAssignment
    return int(assignment.assignKeyToParallelOperator(row, MAX_PARALLELISM, parallelism))
