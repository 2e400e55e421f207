"""Repeats work that may fail because of Redis, in a thread of its own."""

import logging
import threading
from collections.abc import Callable

from redis.exceptions import RedisError

from core.credentials import in_one_line

logger = logging.getLogger(__name__)

EVERY_S = 0.1
"""Time between two calls."""


class Periodic:
    """Calls `work` every `EVERY_S` until it is closed. Logs the first of several failures in a row, and goes on."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._work = work
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        failing = False
        while not self._closed.wait(EVERY_S):
            try:
                self._work()
                failing = False
            except (RedisError, ValueError) as error:
                if not failing:
                    logger.warning("%s: %s", self._thread.name, in_one_line(error))
                failing = True
