"""A backlog becomes visible at once, and is drained when each request has an answer. Tested without Kafka."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import TopicPartition
from made_job import made_answer

from benchmarks import on_flink
from benchmarks.on_flink import drain
from benchmarks.zero_engine import ZeroLoads
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import DeadLetter, Request

KAFKA = KafkaConfig()
RECORDS = 10


class MadeKafka:
    """A topic of requests with its producer, its reader of answers, and their clock."""

    def __init__(self, answered: int = RECORDS, letter: DeadLetter | None = None) -> None:
        self.transactions: list[list[bytes]] = []
        self._answers: Iterator[tuple[str, str]] = iter(())
        self._answered = answered
        self._letter = letter
        self.closed = False
        self.now_s = 0.0

    # The clock.

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return 0

    # The producer.

    def init_transactions(self) -> None:
        pass

    def begin_transaction(self) -> None:
        self.transactions.append([])

    def send(self, topic: str, value: bytes, key: bytes) -> None:
        assert topic == KAFKA.requests_topic
        assert key.decode() == Request.from_json(value).session_id
        self.transactions[-1].append(value)

    def flush(self) -> None:
        pass

    def commit_transaction(self) -> None:
        ids = [Request.from_json(value).request_id for value in self.transactions[-1][: self._answered]]
        answers = [(KAFKA.responses_topic, made_answer(0.0, 1.0, request_id=one).response.to_json()) for one in ids]
        letters = [] if self._letter is None else [(KAFKA.dead_letters_topic, self._letter.to_json())]
        self._answers = iter(answers + letters)

    def close(self) -> None:
        self.closed = True

    # The reader.

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        """One answer every 10 ms."""
        for topic, value in self._answers:
            self.now_s += 0.01
            return {TopicPartition(topic, 0): [SimpleNamespace(value=value.encode())]}
        self.now_s += timeout_ms / 1000
        return {}


def drained(made: MadeKafka, monkeypatch: pytest.MonkeyPatch) -> on_flink.Drained:
    monkeypatch.setattr(on_flink, "KafkaProducer", lambda **settings: made)
    monkeypatch.setattr(on_flink, "time", made)
    try:
        return drain(KAFKA, made, ZeroLoads(RECORDS, seed=0).next(1), idle_timeout_s=5.0, name="made")
    finally:
        assert made.closed


def test_all_requests_are_of_one_transaction_and_all_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeKafka()
    found = drained(made, monkeypatch)
    assert [len(sent) for sent in made.transactions] == [RECORDS]
    assert len(set(found.values)) == RECORDS
    assert found.took_s == pytest.approx(0.1)


def test_requests_that_stay_unanswered_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^made: 3 of 10 requests stay unanswered$"):
        drained(MadeKafka(answered=RECORDS - 3), monkeypatch)


def test_a_dead_letter_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    letter = DeadLetter.of(b"", "prompt: too long", stage="inference", topic="t", partition=0, offset=1)
    with pytest.raises(UserError, match=r"^made: prompt: too long$"):
        drained(MadeKafka(answered=RECORDS - 1, letter=letter), monkeypatch)
