"""Matches outcomes to requests: counts answers, dead letters, duplicates and missing requests."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from kafka import KafkaConsumer
from pydantic import ValidationError

from core.errors import UserError, one_line
from core.kafka_config import KafkaConfig
from core.records import DeadLetter, Request, Response
from experiments.kafka_topics import at_end
from experiments.records import ReadySlot, Sent
from workloads.kafka_generator import LoadReport

POLL_MS = 200
WATCH_EVERY_S = 2.0
NAMED_IDS = 5


class Ledger:
    """Records the requests and outcomes of one run. `sent` may be called from the load's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[str, Sent] = {}
        self._responses: dict[str, Response] = {}
        self._dead: dict[str, DeadLetter] = {}
        self._nameless: list[DeadLetter] = []
        self.duplicates = 0

    def sent(self, request: Request) -> None:
        entry = Sent(request_id=request.request_id, session_id=request.session_id, created_at_ms=request.created_at_ms)
        with self._lock:
            self._sent[request.request_id] = entry

    def response(self, response: Response) -> None:
        """Record an answer. Only the first outcome of a request counts."""
        if self._settled(response.request_id):
            self.duplicates += 1
        else:
            self._responses[response.request_id] = response

    def dead_letter(self, letter: DeadLetter) -> None:
        """Record a dead letter. One without a readable id is kept, but settles no request."""
        if letter.request_id is None:
            self._nameless.append(letter)
        elif self._settled(letter.request_id):
            self.duplicates += 1
        else:
            self._dead[letter.request_id] = letter

    def missing(self) -> list[str]:
        """Ids of requests without an outcome, in the order of sending."""
        with self._lock:
            return [request_id for request_id in self._sent if not self._settled(request_id)]

    @property
    def settled(self) -> int:
        return len(self._responses) + len(self._dead)

    @property
    def all_sent(self) -> tuple[Sent, ...]:
        with self._lock:
            return tuple(self._sent.values())

    @property
    def responses(self) -> tuple[Response, ...]:
        return tuple(self._responses.values())

    @property
    def dead_letters(self) -> tuple[DeadLetter, ...]:
        return (*self._dead.values(), *self._nameless)

    def _settled(self, request_id: str) -> bool:
        return request_id in self._responses or request_id in self._dead


class Collector:
    """Reads a run's answers and dead letters into its ledger."""

    def __init__(self, consumer: KafkaConsumer, kafka: KafkaConfig, ledger: Ledger) -> None:
        self._consumer = consumer
        self._kafka = kafka
        self._ledger = ledger

    def until_settled(
        self, load: "Future[LoadReport]", idle_timeout_s: float, watch: Callable[[], None], on_progress: "OnProgress"
    ) -> LoadReport:
        """Read until `load` has ended and each of its requests has an outcome.

        `watch` is called every few seconds; it raises if no more answers can come. Raises `UserError` if requests are
        outstanding and nothing arrives for `idle_timeout_s`, or if Kafka did not take the load.
        """
        last_s = watched_s = time.monotonic()
        while True:
            if self.read(POLL_MS):
                last_s = time.monotonic()
                on_progress(self._ledger.settled)
            report = load.result() if load.done() else None
            if report is not None and report.errors:
                raise UserError(
                    f"Kafka did not take {report.errors} of {report.sent} requests (first: {report.first_error}); "
                    "look at the broker"
                )
            missing = self._ledger.missing()
            if not missing:
                if report is not None:
                    return report
                # No request is outstanding: this is a pause in the load, not silence of the job.
                last_s = time.monotonic()
            if time.monotonic() - last_s > idle_timeout_s:
                raise UserError(_silence(missing, len(self._ledger.all_sent), idle_timeout_s))
            if time.monotonic() - watched_s > WATCH_EVERY_S:
                watch()
                watched_s = time.monotonic()

    def rest(self) -> int:
        """Read to the end of the topics; return the number of duplicates among the records read."""
        before = self._ledger.duplicates
        while not at_end(self._consumer):
            self.read(POLL_MS)
        return self._ledger.duplicates - before

    def read(self, timeout_ms: int) -> int:
        """Record what arrives within `timeout_ms`; return the number of records."""
        polled = self._consumer.poll(timeout_ms=timeout_ms)
        count = 0
        for partition, records in polled.items():
            for record in records:
                count += 1
                try:
                    if partition.topic == self._kafka.responses_topic:
                        self._ledger.response(Response.model_validate_json(record.value))
                    else:
                        self._ledger.dead_letter(DeadLetter.model_validate_json(record.value))
                except ValidationError as error:
                    raise UserError(f"{partition.topic}, offset {record.offset}: {one_line(error)}") from None
        return count


OnProgress = Callable[[int], None]
"""Called with the number of requests that have an outcome."""


def wait_for_slots(
    consumer: KafkaConsumer, parallelism: int, timeout_s: float, watch: Callable[[], None], on_progress: OnProgress
) -> tuple[ReadySlot, ...]:
    """Wait until all slots have reported that they are ready; return their records. Raises `UserError` at a timeout."""
    deadline_s = time.monotonic() + timeout_s
    slots: dict[int, ReadySlot] = {}
    watched_s = time.monotonic()
    while len(slots) < parallelism:
        for records in consumer.poll(timeout_ms=POLL_MS).values():
            for record in records:
                try:
                    ready = ReadySlot.model_validate(json.loads(record.value))
                except ValidationError as error:
                    raise UserError(f"ready record: {one_line(error)}") from None
                slots[ready.slot] = ready
                on_progress(len(slots))
        if time.monotonic() > deadline_s:
            raise UserError(
                f"{len(slots)} of {parallelism} slots are ready after {timeout_s:.0f} s; look at Flink's log, "
                "or allow more with --ready-timeout-s"
            )
        if time.monotonic() - watched_s > WATCH_EVERY_S:
            watch()
            watched_s = time.monotonic()
    return tuple(slots[slot] for slot in sorted(slots))


def _silence(missing: list[str], sent: int, idle_timeout_s: float) -> str:
    named = ", ".join(missing[:NAMED_IDS]) + (", ..." if len(missing) > NAMED_IDS else "")
    return (
        f"no answer for {idle_timeout_s:.0f} s, {len(missing)} of {sent} requests missing ({named}); "
        "look at Flink's log, or allow more with --idle-timeout-s"
    )
