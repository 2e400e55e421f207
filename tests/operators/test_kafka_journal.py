"""One contract for the journal in Kafka and the one in memory, which other tests use."""

import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Protocol

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

from core.kafka_config import KafkaConfig
from local_stack import LocalStack
from operators.delivery.journal import Journal, Partition
from operators.delivery.kafka_journal import KafkaJournal
from tests.operators.memory_journal import MemoryJournal, Transaction, TransactionState

TOPIC, OTHER = "answers", "letters"
CODECS = ("gzip", "snappy", "lz4", "zstd")


class TopicPair(Protocol):
    """Two topics with two partitions each, and their journal."""

    journal: Journal

    def named(self, topic: str) -> str: ...

    def write(self, transaction: str | None, number: int, *keys: str) -> None:
        """Write a record for each key. A transaction begins with its first records."""
        ...

    def end(self, transaction: str, *, commit: bool) -> None:
        """End the transaction. It wrote only to partition 0, where its marker takes an offset."""
        ...

    def forget(self, number: int, before: int) -> None:
        """Let the broker drop the records before this offset."""
        ...


class InMemory:
    def __init__(self) -> None:
        self.journal = MemoryJournal(2)
        self._open: dict[str, Transaction] = {}

    def named(self, topic: str) -> str:
        return topic

    def write(self, transaction: str | None, number: int, *keys: str) -> None:
        within = () if transaction is None else (self._open.setdefault(transaction, Transaction()),)
        for key in keys:
            self.journal.append(TOPIC, number, key, b"v", *within)

    def end(self, transaction: str, *, commit: bool) -> None:
        self._open.pop(transaction).outcome = TransactionState.COMMITTED if commit else TransactionState.ABORTED
        self.journal.gap(TOPIC, 0)

    def forget(self, number: int, before: int) -> None:
        self.journal.logs[Partition(TOPIC, number)][:before] = [None] * before


class InKafka:
    def __init__(self, brokers: str) -> None:
        self._brokers = brokers
        self._prefix = uuid.uuid4().hex[:12]
        self._producers: dict[str | None, KafkaProducer] = {}
        self._open: set[str] = set()
        self._admin = KafkaAdminClient(bootstrap_servers=brokers)
        self._admin.create_topics([NewTopic(self.named(topic), 2, 1) for topic in (TOPIC, OTHER)])
        self.journal = KafkaJournal(KafkaConfig(brokers=brokers), patience_s=2.0)

    def named(self, topic: str) -> str:
        return f"{self._prefix}.{topic}"

    def write(self, transaction: str | None, number: int, *keys: str) -> None:
        if transaction not in self._producers:
            name = None if transaction is None else f"{self._prefix}-{transaction}"
            self._producers[transaction] = KafkaProducer(bootstrap_servers=self._brokers, transactional_id=name)
            if transaction is not None:
                self._producers[transaction].init_transactions()
        producer = self._producers[transaction]
        if transaction is not None and transaction not in self._open:
            self._open.add(transaction)
            producer.begin_transaction()
        for key in keys:
            producer.send(self.named(TOPIC), key=key.encode(), value=b"v", partition=number)
        producer.flush()

    def end(self, transaction: str, *, commit: bool) -> None:
        producer = self._producers[transaction]
        (producer.commit_transaction if commit else producer.abort_transaction)()
        self._open.remove(transaction)

    def forget(self, number: int, before: int) -> None:
        self._admin.delete_records({TopicPartition(self.named(TOPIC), number): before})

    def close(self) -> None:
        self.journal.close()
        for transaction, producer in self._producers.items():
            if transaction in self._open:
                producer.abort_transaction()
            producer.close()
        self._admin.delete_topics([self.named(TOPIC), self.named(OTHER)])
        self._admin.close()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def topics(request: pytest.FixtureRequest) -> Iterator[TopicPair]:
    if request.param == "memory":
        yield InMemory()
        return
    stack: LocalStack = request.getfixturevalue("stack")
    with closing(InKafka(stack.addresses().brokers)) as made:
        yield made


def read(topics: TopicPair, *spans: range, committed: bool) -> dict[int, list[str]]:
    """The keys in a span of each partition."""
    wanted = {Partition(topics.named(TOPIC), number): span for number, span in enumerate(spans)}
    found: dict[int, list[str]] = {}
    for record in topics.journal.read(wanted, committed=committed):
        assert record.offset in wanted[record.partition]
        found.setdefault(record.partition.number, []).append((record.key or b"").decode())
    return found


def ends(topics: TopicPair, *, decided: bool = False) -> dict[int, int]:
    found = topics.journal.ends([topics.named(TOPIC)], decided=decided)
    return {place.number: offset for place, offset in found.items()}


def test_spans_are_read_as_often_as_one_likes_and_no_more_than_them(topics: TopicPair) -> None:
    topics.write(None, 0, "a", "b", "c", "d")
    topics.write(None, 1, "e")
    for _ in range(2):
        assert read(topics, range(1, 3), range(1), committed=False) == {0: ["b", "c"], 1: ["e"]}
    assert read(topics, range(3, 4), committed=True) == {0: ["d"]}
    assert read(topics, range(2, 2), committed=True) == {}
    assert list(topics.journal.read({}, committed=False)) == []
    assert topics.journal.begins([topics.named(OTHER)]) == {Partition(topics.named(OTHER), n): 0 for n in (0, 1)}


def test_what_was_aborted_is_seen_by_those_alone_who_do_not_ask_for_committed_records(topics: TopicPair) -> None:
    topics.write("one", 0, "a", "b")
    topics.end("one", commit=True)
    topics.write("two", 0, "c")
    topics.end("two", commit=False)
    topics.write(None, 0, "d")
    everything = range(ends(topics)[0])
    assert everything == range(6)
    assert ends(topics, decided=True) == {0: 6, 1: 0}
    assert read(topics, everything, committed=True) == {0: ["a", "b", "d"]}
    assert read(topics, everything, committed=False) == {0: ["a", "b", "c", "d"]}
    assert read(topics, range(2, 5), committed=True) == {}


def test_a_transaction_that_has_not_ended_holds_what_comes_after_it(topics: TopicPair) -> None:
    topics.write(None, 0, "a")
    topics.write("left", 0, "b")
    topics.write(None, 0, "c")
    assert ends(topics) == {0: 3, 1: 0}
    assert ends(topics, decided=True) == {0: 1, 1: 0}
    assert read(topics, range(3), committed=False) == {0: ["a", "b", "c"]}
    assert read(topics, range(1), committed=True) == {0: ["a"]}
    with pytest.raises(TimeoutError, match="transaction is"):
        read(topics, range(3), committed=True)
    topics.end("left", commit=True)
    assert read(topics, range(3), committed=True) == {0: ["a", "b", "c"]}


def test_records_that_are_gone_are_left_out(topics: TopicPair) -> None:
    topics.write(None, 0, "a", "b", "c")
    topics.forget(0, 2)
    assert topics.journal.begins([topics.named(TOPIC)]) == {
        Partition(topics.named(TOPIC), n): 2 - 2 * n for n in (0, 1)
    }
    assert read(topics, range(3), committed=False) == {0: ["c"]}
    assert read(topics, range(2), committed=False) == {}


def test_offsets_are_found_by_time(topics: TopicPair) -> None:
    topics.write(None, 0, "a")
    (record,) = topics.journal.read({Partition(topics.named(TOPIC), 0): range(1)}, committed=False)
    first = Partition(topics.named(TOPIC), 0)
    for at_ms, wanted in ((-5, 0), (0, 0), (record.at_ms, 0), (record.at_ms + 1, 1)):
        assert topics.journal.offsets_at([topics.named(TOPIC)], at_ms) == {first: wanted, first._replace(number=1): 0}


@pytest.mark.integration
def test_records_of_every_codec_are_read(stack: LocalStack) -> None:
    with closing(InKafka(stack.addresses().brokers)) as topics:
        for codec in CODECS:
            with closing(KafkaProducer(bootstrap_servers=stack.addresses().brokers, compression_type=codec)) as client:
                client.send(topics.named(TOPIC), key=codec.encode(), value=b"v" * 10_000, partition=0)
        span = {Partition(topics.named(TOPIC), 0): range(len(CODECS))}
        for committed in (False, True):
            found = [(record.key, record.value) for record in topics.journal.read(span, committed=committed)]
            assert found == [(codec.encode(), b"v" * 10_000) for codec in CODECS]


@pytest.mark.integration
def test_a_topic_that_is_not_there_is_an_error(stack: LocalStack) -> None:
    journal = KafkaJournal(KafkaConfig(brokers=stack.addresses().brokers))
    with closing(journal), pytest.raises(LookupError, match="has no topic no-such"):
        journal.ends(["no-such"])
