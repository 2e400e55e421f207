"""Whenever processes die, each request has one outcome, and only those that kill processes are given up."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.records import DeadLetter
from operators.envelope import Answer, Envelope, RecordPosition
from operators.slots.retry_tracker import Retry, RetryTracker
from tests.operators.test_slot import envelope


def tracker(max_attempts: int = 2, timeout_ms: float = 0.0) -> RetryTracker:
    return RetryTracker(max_attempts, timeout_ms)


def taken(made: RetryTracker, *numbers: int) -> list[Envelope]:
    envelopes = [envelope(number) for number in numbers]
    for one in envelopes:
        made.take(one)
    return envelopes


def given_now(made: RetryTracker) -> list[int]:
    return [one.position.offset for one in made.give()]


def at(number: int) -> RecordPosition:
    return envelope(number).position


def outcome(came: list[Answer | Retry]) -> dict[int, object]:
    """By request: its number of attempts, or why it was given up."""
    found: dict[int, object] = {}
    for one in came:
        if isinstance(one, Retry):
            found[one.envelope.position.offset] = one.envelope.attempts
        else:
            assert isinstance(one.record, DeadLetter)
            found[one.position.offset] = one.record.reason
    return found


def test_what_comes_is_given_at_once() -> None:
    made = tracker()
    taken(made, 1, 2)
    assert given_now(made) == [1, 2]
    taken(made, 3)
    assert given_now(made) == [3]
    assert given_now(made) == []
    assert len(made) == 3


def test_what_had_begun_is_asked_again_one_by_one_and_the_rest_follows() -> None:
    made = tracker()
    taken(made, 1, 2, 3, 4)
    made.give()
    made.began([at(1)])
    made.began([at(3)])
    assert outcome(made.lost("was ended by SIGKILL")) == {1: 1, 3: 1}
    taken(made, 5)
    assert given_now(made) == [1]
    assert given_now(made) == []
    made.began([at(1)])
    made.answered(at(1))
    assert given_now(made) == [3]
    made.answered(at(3))
    assert given_now(made) == [2, 4, 5]


def test_who_it_dies_of_again_is_given_up_and_says_how() -> None:
    made = tracker(max_attempts=3)
    (poison,) = taken(made, 1)
    ends = []
    for how in ("hung", "was ended by SIGSEGV", "was ended by SIGKILL"):
        made.give()
        made.began([at(1)])
        ends.append(outcome(made.lost(how)))
    assert ends == [
        {1: 1},
        {1: 2},
        {1: "the slot's process died 3 times while it worked on this request: was ended by SIGKILL"},
    ]
    assert len(made) == 0
    assert made.give() == []
    assert poison.attempts == 0


def test_a_single_attempt_is_the_only_one() -> None:
    made = tracker(max_attempts=1)
    taken(made, 1)
    made.give()
    made.began([at(1)])
    assert outcome(made.lost("hung")) == {1: "the slot's process died once while it worked on this request: hung"}


def test_a_prompt_that_kills_before_it_has_begun_is_found_too() -> None:
    """The process dies before any request has begun, for example in a tokenizer. Only a request alone uses attempts."""
    made = tracker()
    taken(made, 1, 2)
    made.give()
    assert made.lost("hung") == []
    assert given_now(made) == [1]
    made.answered(at(1))
    assert given_now(made) == [2]
    assert outcome(made.lost("hung")) == {2: 1}
    assert given_now(made) == [2]
    assert list(outcome(made.lost("hung"))) == [2]
    assert len(made) == 0


def test_a_suspect_of_before_a_restart_is_alone_too() -> None:
    made = tracker()
    taken(made, 1)
    made.take(Envelope(0, b"", RecordPosition("t", 0, 7), 0.0, attempts=1))
    taken(made, 2)
    assert given_now(made) == [7]
    assert given_now(made) == []
    made.answered(at(7))
    assert given_now(made) == [1, 2]


def test_nothing_joins_what_runs_once_a_suspect_waits() -> None:
    made = tracker()
    taken(made, 1)
    assert given_now(made) == [1]
    made.take(Envelope(0, b"", RecordPosition("t", 0, 7), 0.0, attempts=1))
    taken(made, 2)
    assert given_now(made) == []
    made.answered(at(1))
    assert given_now(made) == [7]
    made.answered(at(7))
    assert given_now(made) == [2]


@pytest.mark.parametrize("suspect", [False, True])
def test_what_the_process_does_not_have_times_out(suspect: bool) -> None:
    made = tracker(timeout_ms=100.0)
    old = Envelope(0, envelope(1).raw, at(1), 1000.0, attempts=int(suspect))
    made.take(old)
    assert made.expire(1099.0) == []
    (answer,) = made.expire(1100.0)
    assert isinstance(answer.record, DeadLetter)
    assert answer.record.reason.startswith("timeout: not answered within 100 ms")
    assert (answer.position, answer.record.raw) == (old.position, old.raw)
    assert len(made) == 0
    assert made.give() == []


def test_what_the_process_has_is_the_engines_to_time_out() -> None:
    made = tracker(timeout_ms=100.0)
    made.take(Envelope(0, envelope(1).raw, at(1), 1000.0))
    made.give()
    assert made.expire(5000.0) == []


def test_without_a_time_out_nothing_is_too_old() -> None:
    made = tracker()
    taken(made, 1)
    assert made.expire(1e15) == []


@given(seed=st.integers(0, 1 << 30), max_attempts=st.integers(1, 3), rows=st.integers(1, 4))
def test_each_request_has_one_outcome_whatever_dies(seed: int, max_attempts: int, rows: int) -> None:
    """A process that begins up to `rows` requests at a time, and dies of poison, and sometimes without a cause."""
    chance = random.Random(seed)
    made = tracker(max_attempts)
    total = 12
    poison = {number for number in range(total) if chance.random() < 0.3}
    coming = list(range(total))
    waits: list[int] = []
    runs: list[int] = []
    answered: list[int] = []
    given_up: list[int] = []
    deaths: dict[int, int] = dict.fromkeys(range(total), 0)
    # An innocent request survives one death more than it shares with poisonous ones.
    strokes = 1 if max_attempts > 2 else 0

    def die() -> None:
        for number in runs:
            deaths[number] += 1
        for number, how in outcome(made.lost("died")).items():
            if isinstance(how, str):
                given_up.append(number)
            else:
                assert how == deaths[number]
        waits.clear()
        runs.clear()

    for _ in range(2000):
        if coming and chance.random() < 0.5:
            taken(made, coming.pop(0))
        waits += given_now(made)
        while waits and len(runs) < rows:
            runs.append(waits.pop(0))
            made.began([at(runs[-1])])
        if runs and (runs[0] in poison or (strokes and chance.random() < 0.1)):
            strokes -= runs[0] not in poison
            die()
        elif runs:
            number = runs.pop(0)
            answered.append(number)
            made.answered(at(number))
        if not coming and not made:
            break
    assert sorted(answered + given_up) == list(range(total))
    if max_attempts > 1:
        assert set(given_up) == poison
        assert {deaths[number] for number in given_up} <= {max_attempts}
