"""The cache experiment's job: Kafka -> decode -> session-affine slots -> micro-batch inference -> Kafka.

Submit it with

    flink run -py pipelines/cache_experiment.py --brokers 127.0.0.1:9092 --redis-url redis://127.0.0.1:6379 \\
        --strategy FLUID --parallelism 2

Every option and its default: `python pipelines/cache_experiment.py --help`.
"""

from pyflink.common import Types
from pyflink.datastream import DataStream, StreamExecutionEnvironment
from pyflink.table import StreamTableEnvironment

from core.config import JobConfig
from core.errors import exit_on_user_error
from core.model_path import with_model_found
from core.options import Parser, add_options, from_options
from operators.functions import DEAD_LETTERS, KEY_VALUE, READY, DecodeFunction, MicroBatchFunction
from operators.placement import key_of_each_slot
from operators.slot import check_before_start
from pipelines.connectors import add_kafka_sink, ensure_topics, kafka_source
from pipelines.environment import make_environment, subtask_of_key


def build(env: StreamExecutionEnvironment, config: JobConfig) -> DataStream:
    """The job's graph, sinks attached; the stream of responses."""
    tables = StreamTableEnvironment.create(env)
    keys = key_of_each_slot(lambda key: subtask_of_key(key, config.parallelism), config.parallelism)

    decoded = kafka_source(tables, config).process(DecodeFunction(config)).name("decode").uid("decode")
    responses = (
        decoded.key_by(lambda element: keys[element.slot], key_type=Types.INT())
        .process(MicroBatchFunction(config), output_type=KEY_VALUE)
        .name("inference")
        .uid("inference")
    )

    statements = tables.create_statement_set()
    dead_letters = decoded.get_side_output(DEAD_LETTERS).union(responses.get_side_output(DEAD_LETTERS))
    for stream, topic in (
        (responses, config.kafka.responses_topic),
        (dead_letters, config.kafka.dead_letters_topic),
        (responses.get_side_output(READY), config.kafka.ready_topic),
    ):
        add_kafka_sink(tables, statements, stream, config.kafka, topic)
    statements.attach_as_datastream()
    return responses


def main() -> None:
    parser = Parser(prog="cache_experiment.py", description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser, JobConfig)
    config = with_model_found(from_options(JobConfig, parser.parse_args()))
    check_before_start(config)
    ensure_topics(config)
    env = make_environment(config)
    build(env, config)
    env.execute(config.job_name)


if __name__ == "__main__":
    exit_on_user_error(main)
