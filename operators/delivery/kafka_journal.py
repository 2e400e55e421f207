"""Reads a job's journal from Kafka."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

from kafka import KafkaConsumer, TopicPartition

from core.clients import kafka_settings
from core.kafka_config import KafkaConfig
from operators.delivery.journal import Partition, TopicRecord

PATIENCE_S = 60.0
"""Maximum time without a new record. After it the operator fails, and Flink restarts the job with rising delays."""
REQUEST_TIMEOUT_MS = 20_000
POLL_MS = 500

# At its default level the client logs every connection and every metadata request.
logging.getLogger("kafka").setLevel(logging.WARNING)


class KafkaJournal:
    """A `Journal` that connects at its first call. Raises `TimeoutError`, and what kafka-python raises."""

    def __init__(self, kafka: KafkaConfig, patience_s: float = PATIENCE_S) -> None:
        self._kafka = kafka
        self._patience_s = patience_s
        self._consumers: dict[bool, KafkaConsumer] = {}
        self._opened = ExitStack()

    def close(self) -> None:
        self._opened.close()

    def begins(self, topics: Sequence[str]) -> dict[Partition, int]:
        return self._offsets(self._consumer(committed=False).beginning_offsets(self._partitions(topics)))

    def ends(self, topics: Sequence[str], *, decided: bool = False) -> dict[Partition, int]:
        return self._offsets(self._consumer(committed=decided).end_offsets(self._partitions(topics)))

    def offsets_at(self, topics: Sequence[str], at_ms: int) -> dict[Partition, int]:
        ends = self.ends(topics)
        times = {TopicPartition(*partition): max(0, at_ms) for partition in ends}
        found = self._consumer(committed=False).offsets_for_times(times)
        return ends | {Partition(*place): there.offset for place, there in found.items() if there is not None}

    def read(self, spans: Mapping[Partition, range], *, committed: bool) -> Iterator[TopicRecord]:
        begins = self.begins(sorted({partition.topic for partition in spans}))
        ends = {TopicPartition(*partition): span.stop for partition, span in spans.items() if span}
        consumer = self._consumer(committed=committed)
        consumer.assign(list(ends))
        consumer.resume(*ends)
        for place in ends:
            partition = Partition(*place)
            consumer.seek(place, max(spans[partition].start, begins[partition]))
        last_s = time.monotonic()
        while True:
            for place in [place for place, end in ends.items() if consumer.position(place) >= end]:
                consumer.pause(place)
                del ends[place]
            if not ends:
                return
            if time.monotonic() - last_s > self._patience_s:
                raise TimeoutError(_late(ends, self._patience_s))
            for place, records in consumer.poll(timeout_ms=POLL_MS).items():
                last_s = time.monotonic()
                partition = Partition(*place)
                for record in records:
                    if record.offset < spans[partition].stop:
                        yield TopicRecord(partition, record.offset, record.key, record.value, record.timestamp)

    def _consumer(self, *, committed: bool) -> KafkaConsumer:
        if committed not in self._consumers:
            made = KafkaConsumer(
                **kafka_settings(self._kafka.brokers, self._kafka.access),
                bootstrap_timeout_ms=REQUEST_TIMEOUT_MS,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed" if committed else "read_uncommitted",
            )
            self._consumers[committed] = self._opened.enter_context(closing(made))
        return self._consumers[committed]

    def _partitions(self, topics: Sequence[str]) -> list[TopicPartition]:
        consumer = self._consumer(committed=False)
        found = [TopicPartition(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic)]
        if missing := set(topics) - {place.topic for place in found}:
            raise LookupError(f"Kafka at {self._kafka.brokers} has no topic {' or '.join(sorted(missing))}")
        return found

    @staticmethod
    def _offsets(found: Mapping[TopicPartition, int]) -> dict[Partition, int]:
        return {Partition(*place): offset for place, offset in found.items()}


def _late(missing: Mapping[TopicPartition, int], patience_s: float) -> str:
    named = ", ".join(f"{place.topic}-{place.partition} up to {end}" for place, end in sorted(missing.items()))
    return f"Kafka gave nothing for {patience_s:.0f} s; it does not answer, or a transaction is still open: {named}"
