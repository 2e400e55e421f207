"""The graph that all jobs share: Kafka -> decode -> key by slot -> inference -> Kafka."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from py4j.protocol import Py4JJavaError
from pyflink.common import Types
from pyflink.datastream import (
    DataStream,
    KeyedProcessFunction,
    KeyedStream,
    ProcessFunction,
    StreamExecutionEnvironment,
)
from pyflink.java_gateway import get_gateway
from pyflink.table import StreamTableEnvironment
from pyflink.util.exceptions import JavaException

from core.errors import UserError
from core.options import Parser, add_options, from_options, set_own_defaults
from core.stack_trace import root_cause
from operators.config import JobConfig
from operators.flink.decode import DecodeFunction
from operators.flink.inference import inference_function
from operators.flink.rows import DEAD_LETTERS, KEY_VALUE, KEYED, READY
from operators.job_files import with_absolute_paths
from operators.placement import key_of_each_slot
from operators.slots.check import check_before_start
from pipelines.connectors import (
    KafkaSink,
    add_kafka_sink,
    check_transactions,
    ensure_topics,
    kafka_source,
    resume_offsets,
)
from pipelines.environment import make_environment, subtask_of_key
from pipelines.state_ids import name_states
from pipelines.user_errors import end_on_user_errors


@dataclass(frozen=True)
class Functions:
    """The Python functions of the graph. A benchmark replaces them."""

    decode: Callable[[JobConfig, Sequence[int]], ProcessFunction] = DecodeFunction
    """Maps rows of `kafka_source` to rows of type `KEYED`. The sequence has the Flink key of each slot."""
    infer: Callable[[JobConfig], KeyedProcessFunction] = inference_function


def build(
    env: StreamExecutionEnvironment, config: JobConfig, begin: Mapping[int, int], functions: Functions
) -> DataStream:
    """Build the job's graph with its sinks; return the stream of responses. `begin`: see `kafka_source`."""
    tables = StreamTableEnvironment.create(env)
    keys = key_of_each_slot(lambda key: subtask_of_key(key, config.parallelism), config.parallelism)

    decoded = (
        kafka_source(tables, config, begin)
        .process(functions.decode(config, keys), output_type=KEYED)
        .name("decode")
        .uid("decode")
    )
    responses = (
        keyed_in_java(decoded)
        .process(functions.infer(config), output_type=KEY_VALUE)
        .name("inference")
        .uid("inference")
    )

    statements = tables.create_statement_set()
    letters_topic = config.kafka.dead_letters_topic
    # Each stream has its own sink, in the task that it comes from: a sink that both streams of dead letters share can
    # deadlock. Flink aligns barriers on edges from one task to one task, such as those to the sink, but on the edge to
    # inference barriers overtake records. So the sink would block inference's letters until decode's barrier comes,
    # while decode may wait until inference takes more records.
    for sink in (
        KafkaSink("responses", responses, config.kafka.responses_topic),
        KafkaSink("dead-letters-of-decode", decoded.get_side_output(DEAD_LETTERS), letters_topic),
        KafkaSink("dead-letters-of-inference", responses.get_side_output(DEAD_LETTERS), letters_topic),
        KafkaSink("ready", responses.get_side_output(READY), config.kafka.ready_topic),
    ):
        add_kafka_sink(tables, statements, config, sink)
    statements.attach_as_datastream()
    end_on_user_errors(env, decoded, "decode")
    end_on_user_errors(env, responses, "inference")
    name_states(env)
    return responses


def keyed_in_java(rows: DataStream) -> KeyedStream:
    """Key rows of `(key, value)` by their first field; the next function gets the values.

    `DataStream.key_by` would need one more Python operator, and so another round trip to the worker.
    """
    gateway = get_gateway()
    selector = gateway.jvm.org.apache.flink.streaming.api.functions.python.KeyByKeySelector()
    key_type, value_type = KEYED.get_field_types()
    keyed = rows._j_data_stream.keyBy(selector, Types.ROW([key_type]).get_java_type_info())
    return KeyedStream(keyed, value_type, rows)


def run(prog: str, description: str, own_defaults: Mapping[str, Any], functions: Functions = Functions()) -> None:
    """Submit the job with the options of the command line. Raises `UserError` if it cannot start with them."""
    parser = Parser(prog=prog, description=description)
    add_options(parser, JobConfig)
    set_own_defaults(parser, own_defaults)
    config = with_absolute_paths(from_options(JobConfig, parser.parse_args()))
    check_before_start(config)
    ensure_topics(config)
    check_transactions(config)
    begin = resume_offsets(config)
    with refusals_in_a_line():
        env = make_environment(config)
        build(env, config, begin, functions)
        env.execute(config.job_name)


@contextmanager
def refusals_in_a_line() -> Iterator[None]:
    """Turn exceptions of Flink's Java side into `UserError` with their cause."""
    try:
        yield
    except (Py4JJavaError, JavaException) as error:
        cause = root_cause(str(error))
        missing = "; add --ship-connector" if "factory for identifier 'kafka'" in cause else ""
        raise UserError(f"Flink: {cause}{missing}") from error
