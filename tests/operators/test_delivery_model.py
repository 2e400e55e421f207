"""For any order of requests, copies, answers, checkpoints, failures and restarts, each request is answered once.

A model of the job around the real decoder, de-duplication and recovery. It keeps what Flink would: offsets, what is in
flight, and transactions; a failure takes it back to a checkpoint, or leaves the topics alone.
"""

import json
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.clock import ManualClock
from core.kafka_config import KafkaConfig
from core.records import DeadLetter
from operators.decoding import Decoder
from operators.delivery.answered_log import AnsweredLog
from operators.delivery.deduplicator import Deduplicator
from operators.delivery.journal import Partition
from operators.envelope import Envelope, RecordPosition
from operators.placement import SessionAffinity
from tests.operators.memory_journal import NONE, MemoryJournal, Transaction, TransactionState

KAFKA = KafkaConfig()
PARTITIONS = 2
WINDOW = 10_000
slots = st.integers(min_value=1, max_value=3)


@dataclass
class JobSnapshot:
    """The content of a checkpoint."""

    offsets: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(PARTITIONS), 0))
    in_flight: dict[int, dict[RecordPosition, Envelope]] = field(default_factory=dict)
    """By the key of the slot that took the request in, at the parallelism of that time."""


class JobMachine(RuleBasedStateMachine):
    exactly_once = False

    def __init__(self) -> None:
        super().__init__()
        self.journal = MemoryJournal(PARTITIONS)
        self.sent: list[tuple[str, int]] = []
        self.calls = 0
        self.checkpoint = JobSnapshot()
        self.group = self.checkpoint.offsets
        self.unconfirmed: list[Transaction] = []
        """Transactions of the last checkpoint that are pre-committed and not yet committed."""

    @initialize(parallelism=slots)
    def begin(self, parallelism: int) -> None:
        self._start(JobSnapshot(), parallelism)

    @rule(session=st.integers(min_value=0, max_value=4), pause_ms=st.integers(min_value=0, max_value=5000))
    def send(self, session: int, pause_ms: int) -> None:
        self.journal.now_ms += pause_ms
        self.sent.append((f"r{len(self.sent)}", session))
        self._append(*self.sent[-1])

    @precondition(lambda self: self.sent)
    @rule(back=st.integers(min_value=1, max_value=10))
    def send_a_copy(self, back: int) -> None:
        self._append(*self.sent[-min(back, len(self.sent))])

    @precondition(lambda self: self.sent)
    @rule(back=st.integers(min_value=1, max_value=10))
    def send_no_request_under_the_same_id(self, back: int) -> None:
        request_id, session = self.sent[-min(back, len(self.sent))]
        self.journal.append(
            KAFKA.requests_topic, session % PARTITIONS, None, b'{"request_id": "%s"}' % request_id.encode()
        )

    @rule(partition=st.integers(min_value=0, max_value=PARTITIONS - 1), most=st.integers(min_value=1, max_value=5))
    def read(self, partition: int, most: int) -> None:
        log = self.journal.logs[Partition(KAFKA.requests_topic, partition)]
        for offset in range(self.offsets[partition], min(len(log), self.offsets[partition] + most)):
            self.offsets[partition] = offset + 1
            entry = log[offset]
            assert entry is not None
            decoded = self.decoder.decode(entry[0].value, RecordPosition(KAFKA.requests_topic, partition, offset))
            if isinstance(decoded, DeadLetter):
                self._write(0, KAFKA.dead_letters_topic, decoded.request_id, decoded.to_json().encode())
            elif decoded is not None:
                self._restore(decoded.slot)
                self._take_in(decoded.slot, decoded.slot, decoded)

    @rule(key=slots)
    def timer(self, key: int) -> None:
        self._restore(key - 1)

    @rule(key=slots, which=st.integers(min_value=0), dead=st.booleans())
    def answer(self, key: int, which: int, dead: bool) -> None:
        running = self.running.get(key - 1, [])
        if not running:
            return
        envelope = running.pop(which % len(running))
        del self.in_flight[key - 1][envelope.position]
        request_id = envelope.request.request_id
        self.calls += 1
        topic, value = KAFKA.responses_topic, b"answer %d" % self.calls
        if dead:
            place = {"topic": envelope.position.topic, "partition": envelope.position.partition, "offset": 0}
            letter = DeadLetter.of(envelope.raw, f"no {self.calls}", stage="inference", request_id=request_id, **place)
            topic, value = KAFKA.dead_letters_topic, letter.to_json().encode()
        self._write(self._subtask(key - 1), topic, request_id, value)

    @rule(confirmed=st.booleans())
    def make_checkpoint(self, confirmed: bool) -> None:
        self._confirm()
        self.checkpoint = JobSnapshot(dict(self.offsets), deepcopy(self.in_flight))
        self.unconfirmed, self.open = list(self.open.values()), {}
        if confirmed:
            self._confirm()

    @rule(parallelism=slots, with_state=st.booleans())
    def fail(self, parallelism: int, with_state: bool) -> None:
        if with_state:
            self._confirm()
        self._end([*self.unconfirmed, *self.open.values()], TransactionState.ABORTED)
        self.unconfirmed = []
        if not with_state:
            self.checkpoint = JobSnapshot({number: max(0, offset - WINDOW) for number, offset in self.group.items()})
        self._start(self.checkpoint, parallelism)

    @invariant()
    def nothing_is_answered_twice(self) -> None:
        assert all(count == 1 for count in self._answered(committed=False).values())

    @invariant()
    def an_answer_is_what_the_engine_said_first(self) -> None:
        assert all(len(values) == 1 for values in self._said().values())

    def teardown(self) -> None:
        """After all failures each request has its answer."""
        if not hasattr(self, "offsets"):
            return
        for key in range(3):
            self._restore(key)
        for partition in range(PARTITIONS):
            self.read(partition, WINDOW)
        for key in range(1, 4):
            while self.running.get(key - 1):
                self.answer(key, 0, dead=False)
        self.make_checkpoint(confirmed=True)
        assert self._answered(committed=True) == dict.fromkeys((request_id for request_id, _ in self.sent), 1)

    def _append(self, request_id: str, session: int) -> None:
        fields = {"user_id": "u", "max_new_tokens": 1, "created_at_ms": 0.0, "prompt": "p"}
        raw = json.dumps(fields | {"request_id": request_id, "session_id": f"s{session}"}).encode()
        self.journal.append(KAFKA.requests_topic, session % PARTITIONS, None, raw)

    def _start(self, state: JobSnapshot, parallelism: int) -> None:
        self.parallelism = parallelism
        self.offsets, self.in_flight = dict(state.offsets), deepcopy(state.in_flight)
        self.running: dict[int, list[Envelope]] = {}
        self.restored: set[int] = set()
        self.open: dict[int, Transaction] = {}
        deduplicator = Deduplicator(WINDOW, self.journal)
        self.decoder = Decoder(SessionAffinity(parallelism), ManualClock(), deduplicator)
        self.logs = [AnsweredLog(KAFKA, 0, self.journal) for _ in range(parallelism)]

    def _subtask(self, key: int) -> int:
        """Keys of a higher parallelism are at some subtask."""
        return key % self.parallelism

    def _restore(self, key: int) -> None:
        if key in self.restored:
            return
        self.restored.add(key)
        for envelope in list(self.in_flight.get(key, {}).values()):
            del self.in_flight[key][envelope.position]
            self._take_in(key, self._subtask(key), envelope)

    def _take_in(self, key: int, subtask: int, envelope: Envelope) -> None:
        again = self.logs[subtask].look(envelope)
        if again is None:
            # The engine is never asked for what was answered, visibly or not.
            assert envelope.request.request_id not in self._said()
            self.in_flight.setdefault(key, {})[envelope.position] = envelope
            self.running.setdefault(key, []).append(envelope)
        else:
            for record in again:
                assert record.key is not None
                self._write(subtask, record.partition.topic, record.key.decode(), record.value or b"")

    def _write(self, subtask: int, topic: str, key: str | None, value: bytes) -> None:
        transaction = self.open.setdefault(subtask, Transaction()) if self.exactly_once else NONE
        self.journal.append(topic, subtask % PARTITIONS, key, value, transaction)

    def _confirm(self) -> None:
        self._end(self.unconfirmed, TransactionState.COMMITTED)
        self.unconfirmed = []
        self.group = self.checkpoint.offsets

    def _end(self, transactions: list[Transaction], outcome: TransactionState) -> None:
        for transaction in transactions:
            transaction.outcome = outcome
            for number in range(PARTITIONS):
                self.journal.gap(KAFKA.responses_topic, number)
                self.journal.gap(KAFKA.dead_letters_topic, number)

    def _answered(self, *, committed: bool) -> Counter[str]:
        """Number of answers of each request. Includes those that may still be committed, unless `committed`."""
        wanted = (TransactionState.COMMITTED,) if committed else (TransactionState.COMMITTED, TransactionState.OPEN)
        return Counter(request_id for request_id, _, outcome in self._outputs() if outcome in wanted)

    def _said(self) -> dict[str, set[bytes]]:
        """Number of all answers that were ever written, by request."""
        found: dict[str, set[bytes]] = {}
        for request_id, value, _ in self._outputs():
            found.setdefault(request_id, set()).add(value)
        return found

    def _outputs(self) -> Iterator[tuple[str, bytes, TransactionState]]:
        for partition, log in self.journal.logs.items():
            for record, transaction in filter(None, log):
                value = record.value or b""
                letter = partition.topic == KAFKA.dead_letters_topic and b'"inference"' in value
                if partition.topic == KAFKA.responses_topic or letter:
                    yield (record.key or b"").decode(), value, transaction.outcome


class ExactlyOnce(JobMachine):
    exactly_once = True


JobMachine.TestCase.settings = ExactlyOnce.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestAtLeastOnce = JobMachine.TestCase
TestExactlyOnce = ExactlyOnce.TestCase
