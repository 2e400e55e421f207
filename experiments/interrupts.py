"""Ctrl-C and SIGTERM as one exception that unwinds everything, once: what it unwinds is not cut off by a second one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_STATUS = 128 + signal.SIGINT


class Interrupted(BaseException):
    """The user wants to stop. No `Exception`, so that no handler of errors takes it for one."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, the first signal raises `Interrupted` in the main thread; further ones are let pass."""
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
