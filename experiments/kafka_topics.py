"""The topics of one run: created before its job, read from their beginning, deleted afterwards."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import NewTopic
from kafka.errors import KafkaError, UnknownTopicOrPartitionError

from core.clients import kafka_settings
from core.credentials import in_one_line
from core.errors import UserError
from core.kafka_config import KafkaConfig

CONNECT_TIMEOUT_MS = 5_000
METADATA_TIMEOUT_S = 15.0
RECONNECT_MS = 500
RETENTION = {"retention.ms": "-1", "retention.bytes": "-1"}
"""The broker must keep a run's records to the end of the run, whatever its default is."""

# kafka-python logs each failed connection; our errors already say what matters.
logging.getLogger("kafka").setLevel(logging.CRITICAL)


@contextmanager
def fresh_topics(config: KafkaConfig, partitions: int) -> Iterator[None]:
    """Create the four topics of `config`, with `partitions` partitions of requests; delete them afterwards.

    Raises `UserError` if the broker does not answer or refuses.
    """
    topics = [
        NewTopic(
            name=name,
            num_partitions=partitions if name == config.requests_topic else 1,
            replication_factor=-1,
            topic_configs=RETENTION | config.topic_settings(name),
        )
        for name in config.topics
    ]
    try:
        with _admin(config) as admin:
            admin.create_topics(topics)
    except KafkaError as error:
        raise UserError(f"--brokers: Kafka at {config.brokers}: {in_one_line(error)}") from None
    try:
        yield
    finally:
        delete_topics(config)


def delete_topics(config: KafkaConfig) -> None:
    """Delete the topics of `config`; missing ones are ignored."""
    try:
        with _admin(config) as admin:
            for name in config.topics:
                try:
                    admin.delete_topics([name])
                except UnknownTopicOrPartitionError:
                    continue
    except KafkaError as error:
        raise UserError(
            f"topics {config.topic_prefix}.* are left in Kafka ({in_one_line(error)}); delete them"
        ) from None


@contextmanager
def reading(config: KafkaConfig, topics: Sequence[str]) -> Iterator[KafkaConsumer]:
    """Give a consumer that reads committed records of `topics` from the beginning, without a group."""
    consumer = KafkaConsumer(
        **kafka_settings(config.brokers, config.access),
        bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
        group_id=None,
        enable_auto_commit=False,
        isolation_level="read_committed",
        # By default it would look for an absent broker ever less often, down to every 30 s.
        reconnect_backoff_max_ms=RECONNECT_MS,
    )
    try:
        partitions = [partition for topic in topics for partition in _partitions(consumer, topic)]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        yield consumer
    finally:
        consumer.close()


def at_end(consumer: KafkaConsumer) -> bool:
    """True if all records written so far have been read."""
    ends = consumer.end_offsets(list(consumer.assignment()))
    return all(consumer.position(partition) >= end for partition, end in ends.items())


def require_broker(config: KafkaConfig) -> None:
    """Raises `UserError` if no broker answers there."""
    try:
        with _admin(config) as admin:
            admin.list_topics()
    except KafkaError as error:
        raise UserError(
            f"--brokers: Kafka at {config.brokers} does not answer ({in_one_line(error)}); is it running, and are "
            f"--kafka-security and its user right?"
        ) from None


def _partitions(consumer: KafkaConsumer, topic: str) -> list[TopicPartition]:
    deadline_s = time.monotonic() + METADATA_TIMEOUT_S
    # A topic that was just created may not be known yet.
    while not (numbers := consumer.partitions_for_topic(topic)):
        if time.monotonic() > deadline_s:
            raise UserError(f"Kafka does not show the topic {topic} after {METADATA_TIMEOUT_S:.0f} s; look at its log")
        time.sleep(0.1)
    return [TopicPartition(topic, number) for number in sorted(numbers)]


@contextmanager
def _admin(config: KafkaConfig) -> Iterator[KafkaAdminClient]:
    try:
        admin = KafkaAdminClient(
            **kafka_settings(config.brokers, config.access),
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=CONNECT_TIMEOUT_MS,
        )
    except ValueError:
        raise UserError(f"--brokers: {config.brokers} is not host:port,...; give the addresses of Kafka") from None
    try:
        yield admin
    finally:
        admin.close()
