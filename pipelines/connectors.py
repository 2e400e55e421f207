"""Kafka sources and sinks of a job.

They are the Table API's connectors. Unlike PyFlink's DataStream connectors, these deliver a record's raw bytes (null
too), its partition and its offset, and they write a key beside the value.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError
from pyflink.datastream import DataStream
from pyflink.table import DataTypes, Schema, StatementSet, StreamTableEnvironment

from core.clients import kafka_settings
from core.credentials import in_one_line
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import MAX_RESULT_BYTES
from operators.config import Delivery, JobConfig
from operators.flink.rows import WARM_UP
from pipelines.kafka_security import security_properties

CONNECT_TIMEOUT_MS = 5_000
REQUEST_TIMEOUT_MS = 10_000
TRANSACTION_LIMIT = "transaction.max.timeout.ms"
SIZE_LIMIT = "max.message.bytes"
CONNECTOR_JARS = Path(__file__).resolve().parents[1] / ".local" / "jars" / "connector"


def connector_jars() -> list[str]:
    """Return URLs of the connector's jars, for a cluster without them. Raises `UserError` if they are not installed."""
    jars = [jar.as_uri() for jar in sorted(CONNECTOR_JARS.glob("*.jar"))]
    if not jars:
        raise UserError(f"ship_connector: there is no jar in {str(CONNECTOR_JARS)!r}; run scripts/setup.sh")
    return jars


def ensure_topics(config: JobConfig) -> None:
    """Create the job's missing topics.

    Raises `UserError` if the broker does not answer, or if an existing topic's size limit is too small for the job.
    """
    kafka = config.kafka
    admin = _admin(kafka)
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
        _check_sizes(admin, kafka, sorted(present.intersection(kafka.topics)))
    except KafkaError as error:
        raise UserError(f"brokers: cannot create the topics at {kafka.brokers!r}: {in_one_line(error)}") from error
    finally:
        admin.close()


def _check_sizes(admin: KafkaAdminClient, kafka: KafkaConfig, topics: list[str]) -> None:
    """Check the topics' size limits: a record that its topic refuses would fail the job after each restart."""
    needed = {
        topic: int(settings[SIZE_LIMIT]) for topic in topics if SIZE_LIMIT in (settings := kafka.topic_settings(topic))
    }
    for topic, allowed in _told(admin, "topic", list(needed), SIZE_LIMIT).items():
        if allowed < needed[topic]:
            raise UserError(
                f"topic {topic}: its {SIZE_LIMIT} is {allowed}, and records of {needed[topic]} may come; raise it there"
            )


def _told(admin: KafkaAdminClient, kind: str, names: list[str], setting: str) -> dict[str, int]:
    """Return `setting` of each topic or broker that tells it. The client ignores refusals silently."""
    if not names:
        return {}
    asked = [ConfigResource(kind, name, {setting: None}) for name in names]
    found = admin.describe_configs(asked, config_filter="all").get(kind, {})
    return {name: int(settings[setting]["value"]) for name, settings in found.items() if setting in settings}


def resume_offsets(config: JobConfig) -> dict[int, int]:
    """Return the offsets at which a job without state begins, for partitions where its group has an offset.

    They are `resume_records` before the group's offsets. The requests in flight at that point were only in the lost
    state; the topics of answers tell which of them have no answer. Raises `UserError` if the broker does not answer.
    """
    kafka = config.kafka
    try:
        consumer = KafkaConsumer(
            **kafka_settings(kafka.brokers, kafka.access),
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            group_id=kafka.consumer_group,
            enable_auto_commit=False,
        )
        with closing(consumer):
            places = [
                TopicPartition(kafka.requests_topic, n) for n in consumer.partitions_for_topic(kafka.requests_topic)
            ]
            begins = consumer.beginning_offsets(places)
            stands = {place: consumer.committed(place, timeout_ms=REQUEST_TIMEOUT_MS) for place in places}
    except (KafkaError, OSError) as error:
        raise UserError(
            f"brokers: cannot read where group {kafka.consumer_group!r} stands: {in_one_line(error)}"
        ) from error
    return {
        place.partition: max(begins[place], stood - config.delivery.resume_records)
        for place, stood in stands.items()
        if stood is not None
    }


def check_transactions(config: JobConfig) -> None:
    """Raises `UserError` if the brokers do not allow transactions as long as the job's."""
    if config.delivery.delivery is not Delivery.EXACTLY_ONCE:
        return
    with closing(_admin(config.kafka)) as admin:
        try:
            brokers = [str(broker["broker_id"]) for broker in admin.describe_cluster()["brokers"]]
            limits = _told(admin, "broker", brokers, TRANSACTION_LIMIT).values()
        except KafkaError:  # brokers may hide their limit; then the first write fails
            return
    if limits and config.delivery.transaction_timeout_ms > min(limits):
        raise UserError(
            f"transaction_timeout_ms: above the {min(limits)} that the brokers allow; lower it, or raise their "
            f"{TRANSACTION_LIMIT}"
        )


def kafka_source(tables: StreamTableEnvironment, config: JobConfig, begin: Mapping[int, int]) -> DataStream:
    """Return rows of `(value: bytes | None, partition: int, offset: int)` of the requests topic.

    They begin at the offsets `begin`. A partition without one begins at the group's offset, or at the first record for
    a new group. A job that starts with state continues at the offsets of that state.

    Before the requests comes one warm-up row per slot: partition `WARM_UP`, and the slot in place of the offset. It is
    in the same stream because a Python operator opens with its first element. A separate stream would cost every
    request another Python operator, which would key the union of both.
    """
    kafka = config.kafka
    options = _connection(kafka) | {
        "topic": kafka.requests_topic,
        "format": "raw",
        "properties.group.id": kafka.consumer_group,
        "scan.startup.mode": "group-offsets",
        "properties.auto.offset.reset": "earliest",
        "properties.isolation.level": config.delivery.isolation_level.value,
    }
    if begin:
        places = ";".join(f"partition:{partition},offset:{offset}" for partition, offset in sorted(begin.items()))
        options |= {"scan.startup.mode": "specific-offsets", "scan.startup.specific-offsets": places}
    if config.bounded:
        options["scan.bounded.mode"] = "latest-offset"
    tables.execute_sql(
        "CREATE TEMPORARY TABLE requests (`value` BYTES, `partition` INT METADATA VIRTUAL,"
        f" `offset` BIGINT METADATA VIRTUAL) WITH ({_quoted(options)})"
    )
    slots = ", ".join(f"({slot})" for slot in range(config.parallelism))
    rows = (
        "SELECT `value`, `partition`, `offset` FROM requests UNION ALL"
        f" SELECT CAST(NULL AS BYTES), {WARM_UP}, CAST(slot AS BIGINT) FROM (VALUES {slots}) AS slots(slot)"
    )
    return tables.to_data_stream(tables.sql_query(rows))


@dataclass(frozen=True)
class KafkaSink:
    """A stream of `(key, value)` string rows, its topic, and the sink's unique name in the job."""

    name: str
    stream: DataStream
    topic: str


def add_kafka_sink(
    tables: StreamTableEnvironment, statements: StatementSet, config: JobConfig, sink: KafkaSink
) -> None:
    """Write `sink`'s stream to its topic."""
    options = _connection(config.kafka) | {
        "topic": sink.topic,
        "key.format": "raw",
        "key.fields": "key",
        "value.format": "raw",
        "value.fields-include": "EXCEPT_KEY",
        "properties.linger.ms": "0",
        "properties.max.request.size": str(MAX_RESULT_BYTES),
        "properties.compression.type": "none",
        "sink.delivery-guarantee": config.delivery.delivery.value,
    }
    if config.delivery.delivery is Delivery.EXACTLY_ONCE:
        options |= {
            # No other job may use this prefix: a job that starts aborts all open transactions under its prefix.
            "sink.transactional-id-prefix": f"{config.job_name}:{config.kafka.consumer_group}:{sink.topic}:{sink.name}",
            "properties.transaction.timeout.ms": str(config.delivery.transaction_timeout_ms),
        }
    tables.execute_sql(f"CREATE TEMPORARY TABLE `{sink.name}` (`key` STRING, `value` STRING) WITH ({_quoted(options)})")
    schema = Schema.new_builder().column("key", DataTypes.STRING()).column("value", DataTypes.STRING()).build()
    statements.add_insert(f"`{sink.name}`", tables.from_data_stream(sink.stream, schema))


def _admin(kafka: KafkaConfig) -> KafkaAdminClient:
    try:
        return KafkaAdminClient(
            **kafka_settings(kafka.brokers, kafka.access),
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
    except (KafkaError, OSError, ValueError) as error:
        raise UserError(
            f"brokers: no Kafka broker answers at {kafka.brokers!r} ({in_one_line(error)}); is it running, and are "
            f"--kafka-security and its user right?"
        ) from error


def _connection(kafka: KafkaConfig) -> dict[str, str]:
    properties = {"bootstrap.servers": kafka.brokers} | security_properties(kafka.access)
    return {"connector": "kafka"} | {f"properties.{name}": value for name, value in properties.items()}


def _quoted(options: dict[str, str]) -> str:
    return ", ".join("'{}' = '{}'".format(key, value.replace("'", "''")) for key, value in options.items())
