"""Earlier answers are found, whether they can be read or not, and only searched where there can be some."""

import json

import pytest

from core.kafka_config import KafkaConfig
from core.records import DeadLetter
from operators.delivery.answered_log import AnsweredLog
from operators.delivery.journal import Partition
from operators.envelope import Envelope, RecordPosition
from tests.operators.memory_journal import MemoryJournal, Transaction, TransactionState

KAFKA = KafkaConfig()
REQUESTS, RESPONSES, LETTERS = KAFKA.requests_topic, KAFKA.responses_topic, KAFKA.dead_letters_topic
MARGIN_MS = 500


class Topics:
    """Requests `r0`, `r1`, ... one second apart, and the records written for them."""

    def __init__(self, requests: int = 5) -> None:
        self.journal = MemoryJournal()
        self.envelopes = [self.ask(f"r{number}") for number in range(requests)]

    def ask(self, request_id: str) -> Envelope:
        fields = {"session_id": "s", "user_id": "u", "max_new_tokens": 1, "created_at_ms": 0.0, "prompt": "p"}
        raw = json.dumps(fields | {"request_id": request_id}).encode()
        self.journal.now_ms += 1000
        return Envelope(0, raw, RecordPosition(REQUESTS, 0, self.journal.append(REQUESTS, 0, "s", raw)), 0.0)

    def answer(self, request_id: str, transaction: Transaction | None = None, value: bytes = b"answer") -> None:
        within = () if transaction is None else (transaction,)
        self.journal.append(RESPONSES, 0, request_id, value, *within)

    def letter(self, request_id: str, stage: str) -> None:
        letter = DeadLetter.of(b"", "why", stage=stage, request_id=request_id, topic=REQUESTS, partition=0, offset=0)
        self.journal.append(LETTERS, 0, request_id, letter.to_json().encode())

    def log(self) -> AnsweredLog:
        return AnsweredLog(KAFKA, MARGIN_MS, self.journal)


def end(transaction: Transaction, outcome: TransactionState, topics: Topics) -> None:
    transaction.outcome = outcome
    topics.journal.gap(RESPONSES, 0)


def test_an_answer_is_found_and_a_request_without_one_is_asked() -> None:
    topics = Topics()
    topics.answer("r1")
    topics.letter("r2", "inference")
    log = topics.log()
    assert [log.look(envelope) for envelope in topics.envelopes] == [None, (), (), None, None]
    assert (log.answered, log.written_again) == (2, 0)


def test_what_was_written_after_the_attempt_began_is_not_looked_for() -> None:
    topics = Topics(0)
    log = topics.log()
    envelope = topics.ask("r0")
    topics.answer("r0")
    assert log.look(envelope) is None
    assert topics.journal.reads == []


def test_a_partition_that_came_later_holds_nothing_old() -> None:
    topics = Topics(0)
    log = topics.log()
    assert log.look(Envelope(0, b"", RecordPosition(REQUESTS, 7, 0), 0.0)) is None


def test_the_letter_of_a_record_that_was_no_request_answers_none() -> None:
    """A client may misspell a field, get a dead letter, and send the request again with the same id."""
    topics = Topics()
    topics.letter("r1", "decode")
    topics.journal.append(LETTERS, 0, "r2", b"a stranger's record")
    topics.journal.append(RESPONSES, 0, None, b"another one")
    topics.journal.append(RESPONSES, 0, "r3", None)
    log = topics.log()
    assert [log.look(envelope) for envelope in topics.envelopes] == [None, None, None, (), None]


def test_answers_are_read_from_the_oldest_request_on_and_once() -> None:
    topics = Topics(2)
    topics.answer("old")
    topics.answer("r1")
    topics.ask("r2")
    topics.ask("r3")
    topics.answer("r2")
    log = topics.log()
    spans = topics.journal.reads
    assert log.look(topics.envelopes[1]) == ()
    answers = [span[Partition(RESPONSES, 0)] for span in spans if Partition(RESPONSES, 0) in span]
    assert answers == [range(3)]
    spans.clear()
    third = Envelope(0, topics.envelopes[0].raw, RecordPosition(REQUESTS, 0, 2), 0.0)
    assert log.look(third) is None
    assert spans == []


def test_an_older_request_extends_what_is_read_to_before() -> None:
    topics = Topics(1)
    topics.answer("r0")
    topics.journal.now_ms += 10_000
    newer = topics.ask("r1")
    topics.answer("r1")
    log = topics.log()
    assert log.look(newer) == ()
    topics.journal.reads.clear()
    assert log.look(topics.envelopes[0]) == ()
    answers = [span[Partition(RESPONSES, 0)] for span in topics.journal.reads if Partition(RESPONSES, 0) in span]
    assert answers == [range(1)]


@pytest.mark.parametrize(("behind_ms", "found"), [(MARGIN_MS, ()), (MARGIN_MS + 1, None)])
def test_a_writer_whose_clock_is_behind_is_found_within_the_margin(behind_ms: int, found: tuple[()] | None) -> None:
    topics = Topics(1)
    topics.journal.now_ms -= behind_ms
    topics.answer("r0")
    assert topics.log().look(topics.envelopes[0]) == found


def test_a_request_that_kafka_no_longer_has_is_looked_for_everywhere() -> None:
    topics = Topics(1)
    topics.journal.now_ms -= 100_000
    topics.answer("r0")
    topics.journal.logs[Partition(REQUESTS, 0)][0] = None
    assert topics.log().look(topics.envelopes[0]) == ()


def test_an_answer_in_an_aborted_transaction_is_written_again_as_it_was() -> None:
    topics = Topics(3)
    committed, aborted = Transaction(), Transaction()
    topics.answer("r0", committed)
    end(committed, TransactionState.COMMITTED, topics)
    topics.answer("r1", aborted, b"first")
    end(aborted, TransactionState.ABORTED, topics)
    log = topics.log()
    assert log.look(topics.envelopes[0]) == ()
    (again,) = log.look(topics.envelopes[1]) or ()
    assert (again.key, again.value) == (b"r1", b"first")
    assert log.look(topics.envelopes[2]) is None
    assert (log.answered, log.written_again) == (1, 1)


def test_an_answer_that_was_written_again_counts_and_not_its_aborted_ones() -> None:
    topics = Topics(1)
    for outcome in (TransactionState.ABORTED, TransactionState.ABORTED, TransactionState.COMMITTED):
        transaction = Transaction()
        topics.answer("r0", transaction)
        end(transaction, outcome, topics)
    assert topics.log().look(topics.envelopes[0]) == ()


@pytest.mark.parametrize("outcome", [TransactionState.COMMITTED, TransactionState.ABORTED])
def test_a_transaction_that_is_open_is_waited_for(outcome: TransactionState) -> None:
    """A later transaction has been committed, but cannot be read before the open one has ended."""
    topics = Topics(3)
    left, done = Transaction(), Transaction()
    topics.answer("r0", left, b"left")
    topics.answer("r1", done)
    end(done, TransactionState.COMMITTED, topics)
    log = topics.log()
    assert log.look(topics.envelopes[2]) is None
    with pytest.raises(TimeoutError):
        log.look(topics.envelopes[1])
    end(left, outcome, topics)
    assert log.look(topics.envelopes[1]) == ()
    found = log.look(topics.envelopes[0])
    assert found is not None
    assert [record.value for record in found] == ([] if outcome is TransactionState.COMMITTED else [b"left"])


def test_what_other_slots_write_meanwhile_is_not_waited_for() -> None:
    topics = Topics(2)
    topics.answer("r0")
    running = Transaction()
    topics.answer("new", running)
    log = topics.log()
    assert log.look(topics.envelopes[0]) == ()
    assert log.look(topics.envelopes[1]) is None
