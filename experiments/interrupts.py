"""Turns Ctrl-C and SIGTERM into one exception. Further signals are ignored, so that cleaning up is not interrupted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_STATUS = 128 + signal.SIGINT


class Interrupted(BaseException):
    """The user wants to stop. Not an `Exception`, so that no error handler catches it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """In this block the first signal raises `Interrupted` in the main thread; further signals are ignored."""
    raised = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Interrupted

    before = [signal.signal(number, interrupt) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
