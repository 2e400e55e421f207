"""The ledger of a run, and the end of waiting, without a broker."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from experiment_samples import dead_letter, response
from kafka import TopicPartition

from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import Request
from experiments.collector import Collector, Ledger, wait_for_slots
from workloads.kafka_generator import LoadReport
from workloads.pacing import Lag

KAFKA = KafkaConfig()


@dataclass
class PolledRecord:
    value: bytes
    offset: int = 0


class Consumer:
    """Gives one record per poll."""

    def __init__(self, topic: str, values: list[str]) -> None:
        self._partition = TopicPartition(topic, 0)
        self._values: Iterator[str] = iter(values)

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[PolledRecord]]:
        value = next(self._values, None)
        return {} if value is None else {self._partition: [PolledRecord(value.encode())]}


def request(request_id: str) -> Request:
    return Request(request_id=request_id, session_id="s", user_id="u", max_new_tokens=1, created_at_ms=0.0, prompt="p")


def ended(sent: int, errors: int = 0) -> "Future[LoadReport]":
    load: Future[LoadReport] = Future()
    load.set_result(LoadReport(sent, sent - errors, errors, "full" if errors else None, 1.0, None, None, Lag()))
    return load


def collector(ledger: Ledger, values: list[str]) -> Collector:
    return Collector(Consumer(KAFKA.responses_topic, values), KAFKA, ledger)


def nothing(*_: Any) -> None:
    pass


def test_only_the_first_outcome_of_a_request_counts() -> None:
    ledger = Ledger()
    for name in "abc":
        ledger.sent(request(name))
    ledger.response(response(request_id="a", text="first"))
    ledger.response(response(request_id="a", text="second"))
    ledger.dead_letter(dead_letter(request_id="b"))
    ledger.dead_letter(dead_letter(request_id="a"))
    assert [answer.text for answer in ledger.responses] == ["first"]
    assert (ledger.duplicates, ledger.settled, ledger.missing()) == (2, 2, ["c"])


def test_a_dead_letter_without_an_id_settles_nothing_and_is_kept() -> None:
    ledger = Ledger()
    ledger.sent(request("a"))
    ledger.dead_letter(dead_letter())
    assert ledger.missing() == ["a"]
    assert len(ledger.dead_letters) == 1


def test_it_ends_with_the_last_outcome() -> None:
    ledger, seen = Ledger(), []
    for name in "ab":
        ledger.sent(request(name))
    values = [response(request_id=name).to_json() for name in ("b", "b", "a")]
    report = collector(ledger, values).until_settled(ended(2), 60, nothing, seen.append)
    assert report.sent == 2
    assert (seen, ledger.duplicates) == ([1, 1, 2], 1)


def test_silence_names_how_many_are_missing_and_which() -> None:
    ledger = Ledger()
    for number in range(8):
        ledger.sent(request(f"r{number}"))
    with pytest.raises(UserError, match=r"7 of 8 requests missing \(r0, r1, r2, r4, r5, \.\.\.\)"):
        collector(ledger, [response(request_id="r3").to_json()]).until_settled(ended(8), 0.01, nothing, nothing)


def test_a_load_that_kafka_did_not_take_ends_the_wait() -> None:
    with pytest.raises(UserError, match=r"did not take 1 of 3 requests \(first: full\)"):
        collector(Ledger(), []).until_settled(ended(3, errors=1), 60, nothing, nothing)


def test_an_error_of_the_load_is_raised() -> None:
    load: Future[LoadReport] = Future()
    load.set_exception(UserError("line 7: no row"))
    with pytest.raises(UserError, match="line 7"):
        collector(Ledger(), []).until_settled(load, 60, nothing, nothing)


def test_an_answer_that_is_none_is_named_by_its_offset() -> None:
    with pytest.raises(UserError, match=r"llm\.responses, offset 0: request_id: missing"):
        collector(Ledger(), ['{"text": 1}']).read(0)


def test_ready_once_every_slot_has_said_so() -> None:
    said = [json.dumps({"slot": n, "device": "cpu", "model": "m", "engine": "e", "load_s": 1.5}) for n in (1, 1, 0)]
    slots = wait_for_slots(Consumer(KAFKA.ready_topic, said), 2, 60, nothing, nothing)
    assert [slot.slot for slot in slots] == [0, 1]
    assert slots[0].model_dump()["load_s"] == 1.5
    with pytest.raises(UserError, match="2 of 3 slots are ready"):
        wait_for_slots(Consumer(KAFKA.ready_topic, said), 3, 0.05, nothing, nothing)
