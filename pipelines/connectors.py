"""Kafka in and out of a job.

The Table API's connectors stand at both ends: unlike the DataStream ones of PyFlink they hand over a record's bytes as
they are (null included), its partition and offset, and write a key beside the value.
"""

from pathlib import Path

from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError
from pyflink.datastream import DataStream
from pyflink.table import DataTypes, Schema, StatementSet, StreamTableEnvironment

from core.clients import kafka_settings
from core.config import MAX_DEAD_LETTER_BYTES, JobConfig, KafkaConfig
from core.credentials import in_one_line
from core.errors import UserError
from operators.functions import WARM_UP
from pipelines.kafka_security import security_properties

CONNECTOR_JARS = Path(__file__).resolve().parents[1] / ".local" / "jars" / "connector"


def connector_jars() -> list[str]:
    """URLs of the connector's jars, for a cluster without them. Raises `UserError` where set-up has not run."""
    jars = [jar.as_uri() for jar in sorted(CONNECTOR_JARS.glob("*.jar"))]
    if not jars:
        raise UserError(f"ship_connector: there is no jar in {str(CONNECTOR_JARS)!r}; run scripts/setup.sh")
    return jars


def ensure_topics(config: JobConfig) -> None:
    """Create the job's topics where they are missing. Raises `UserError` where the broker does not answer."""
    kafka = config.kafka
    try:
        admin = KafkaAdminClient(
            **kafka_settings(kafka.brokers, kafka.access), bootstrap_timeout_ms=5_000, request_timeout_ms=10_000
        )
    except (KafkaError, OSError, ValueError) as error:
        raise UserError(
            f"brokers: no Kafka broker answers at {kafka.brokers!r} ({in_one_line(error)}); is it running, and are "
            f"--kafka-security and its user right?"
        ) from error
    try:
        present = set(admin.list_topics())
        for topic in kafka.topics:
            if topic in present:
                continue
            settings = kafka.topic_settings(topic)
            try:
                admin.create_topics(
                    [NewTopic(topic, num_partitions=config.parallelism, replication_factor=-1, topic_configs=settings)]
                )
            except TopicAlreadyExistsError:
                continue
    except KafkaError as error:
        raise UserError(f"brokers: cannot create the topics at {kafka.brokers!r}: {in_one_line(error)}") from error
    finally:
        admin.close()


def kafka_source(tables: StreamTableEnvironment, config: JobConfig) -> DataStream:
    """Rows of `(value: bytes | None, partition: int, offset: int)` of the requests topic, from where the group stands.

    Before them, once for each slot, a row that calls it to warm up: partition `WARM_UP`, the slot in place of the
    offset. It comes with the requests because a Python operator opens with its first element, and because a stream
    of its own would cost every request another Python operator, the one that keys the union of both.
    """
    kafka = config.kafka
    options = _connection(kafka) | {
        "topic": kafka.requests_topic,
        "format": "raw",
        "properties.group.id": kafka.consumer_group,
        # Where the group stands, as the last checkpoint wrote it; a new group begins with the topic.
        "scan.startup.mode": "group-offsets",
        "properties.auto.offset.reset": "earliest",
    }
    if config.bounded:
        options["scan.bounded.mode"] = "latest-offset"
    tables.execute_sql(
        "CREATE TEMPORARY TABLE requests (`value` BYTES, `partition` INT METADATA VIRTUAL,"
        f" `offset` BIGINT METADATA VIRTUAL) WITH ({_quoted(options)})"
    )
    calls = ", ".join(f"(CAST(NULL AS BYTES), {WARM_UP}, CAST({slot} AS BIGINT))" for slot in range(config.parallelism))
    rows = "SELECT `value`, `partition`, `offset` FROM requests UNION ALL SELECT * FROM (VALUES {})"
    return tables.to_data_stream(tables.sql_query(rows.format(calls)))


def add_kafka_sink(
    tables: StreamTableEnvironment, statements: StatementSet, stream: DataStream, kafka: KafkaConfig, topic: str
) -> None:
    """Write a stream of `(key, value)` string rows to `topic`, at least once."""
    options = _connection(kafka) | {
        "topic": topic,
        "key.format": "raw",
        "key.fields": "key",
        "value.format": "raw",
        "value.fields-include": "EXCEPT_KEY",
        "properties.linger.ms": "0",
        "properties.max.request.size": str(MAX_DEAD_LETTER_BYTES),
        "properties.compression.type": "none",
        "sink.delivery-guarantee": "at-least-once",
    }
    tables.execute_sql(f"CREATE TEMPORARY TABLE `{topic}` (`key` STRING, `value` STRING) WITH ({_quoted(options)})")
    schema = Schema.new_builder().column("key", DataTypes.STRING()).column("value", DataTypes.STRING()).build()
    statements.add_insert(f"`{topic}`", tables.from_data_stream(stream, schema))


def _connection(kafka: KafkaConfig) -> dict[str, str]:
    properties = {"bootstrap.servers": kafka.brokers} | security_properties(kafka.access)
    return {"connector": "kafka"} | {f"properties.{name}": value for name, value in properties.items()}


def _quoted(options: dict[str, str]) -> str:
    return ", ".join("'{}' = '{}'".format(key, value.replace("'", "''")) for key, value in options.items())
