"""Messages of a channel arrive complete and in order, and each end notices when the other is closed."""

import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from operators.envelope import Answer, Envelope, MicroBatch, RecordPosition, WrittenResponse
from operators.slots.channel import Channel, ChannelClosedError
from tests.experiments.experiment_samples import response
from tests.operators.stand_in_slot import envelope, letter

WAIT_S = 20.0
"""Time limit of waits, which only a failure reaches."""
HOUR_S = 3600.0
"""A poll with this time-out ends in time only if a message or the end of the channel ends it."""
LARGE = bytes(range(256)) * 4000
"""More bytes than a socket buffers."""


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = map(Channel, Pipe())
    yield ours, theirs
    ours.close()
    theirs.close()


def at_once(what: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    return thread


def test_both_sides_hear_what_the_other_one_says_in_its_order(ends: tuple[Channel, Channel]) -> None:
    said: list[Any] = [
        [envelope(1), MicroBatch([envelope(2), Envelope(3, b"\xff", RecordPosition("t", 1, 2), 0.5, attempts=1)])],
        [Answer(RecordPosition("t", 0, 1), letter(envelope(1)))],
        [Answer(RecordPosition("t", 0, 2), WrittenResponse.of(response(text="ok \udfff")))],
        [],
        None,
    ]
    for ours, theirs in (ends, ends[::-1]):
        for what in said:
            ours.send(what)
        for what in said:
            assert theirs.poll(WAIT_S)
            assert theirs.receive() == what
        assert not theirs.poll(0.0)


def test_what_is_larger_than_the_socket_arrives_whole(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    sending = at_once(lambda: ours.send([LARGE, 1]))
    assert theirs.receive() == [LARGE, 1]
    sending.join(WAIT_S)


def test_what_several_threads_send_is_not_mixed(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    times = 5
    senders = [at_once(lambda name=name: [ours.send((name, LARGE)) for _ in range(times)]) for name in "abcd"]  # type: ignore[misc]
    heard = [theirs.receive() for _ in range(times * len(senders))]
    assert Counter(name for name, _ in heard) == dict.fromkeys("abcd", times)
    assert all(large == LARGE for _, large in heard)
    for sender in senders:
        sender.join(WAIT_S)


def test_nothing_is_said_before_it_is_sent(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    assert not theirs.poll(0.0)
    assert not theirs.poll(0.01)
    ours.send("first")
    assert theirs.poll(0.0)
    # A poll consumes nothing.
    assert theirs.poll(WAIT_S)
    assert theirs.receive() == "first"
    assert not theirs.poll(0.0)


def test_a_look_ends_as_soon_as_something_comes(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    found: list[bool] = []
    looking = at_once(lambda: found.append(theirs.poll(HOUR_S)))
    ours.send("something")
    looking.join(WAIT_S)
    assert found == [True]


@pytest.mark.parametrize("first", [0, 1])
def test_who_hangs_up_is_noticed_after_all_that_was_said(ends: tuple[Channel, Channel], first: int) -> None:
    gone, left = ends[first], ends[1 - first]
    gone.send("last words")
    gone.close()
    assert left.poll(0.0)
    assert left.receive() == "last words"
    for _ in range(2):
        assert left.poll(0.0)
        with pytest.raises(ChannelClosedError):
            left.receive()
        with pytest.raises(ChannelClosedError):
            left.send("anyone?")


@pytest.mark.parametrize("first", [0, 1])
def test_who_hangs_up_without_having_listened_is_noticed(ends: tuple[Channel, Channel], first: int) -> None:
    gone, left = ends[first], ends[1 - first]
    left.send("unheard")
    gone.close()
    assert left.poll(0.0)
    for _ in range(2):
        with pytest.raises(ChannelClosedError):
            left.receive()


def test_a_look_that_waits_notices_the_end_of_the_other_side(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    found: list[bool] = []
    looking = at_once(lambda: found.append(theirs.poll(HOUR_S)))
    ours.close()
    looking.join(WAIT_S)
    assert found == [True]


def test_who_sends_into_a_full_socket_notices_the_end_of_the_other_side(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    raised: list[BaseException] = []

    def send() -> None:
        try:
            while True:
                ours.send(LARGE)
        except ChannelClosedError as error:
            raised.append(error)

    sending = at_once(send)
    assert theirs.poll(WAIT_S)
    theirs.close()
    sending.join(WAIT_S)
    assert len(raised) == 1


def test_the_end_of_the_other_side_in_the_midst_of_a_message_is_a_hang_up_too() -> None:
    ours, theirs = Pipe()
    channel = Channel(theirs)
    # The length of a message, as `Connection` writes it, and only the beginning of the message.
    os.write(ours.fileno(), struct.pack("!i", len(LARGE)) + LARGE[:100])
    ours.close()
    with pytest.raises(ChannelClosedError):
        channel.receive()
    channel.close()
