"""Turns a `UserError` of a function into a line that ends the job: see `pipelines.user_errors`."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import UserError
from operators.flink.rows import USER_ERRORS

logger = logging.getLogger(__name__)


class UserErrors:
    """The user errors of one function. After the first one, the function emits nothing but its line."""

    def __init__(self) -> None:
        self._error: UserError | None = None
        self._told = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Wraps `open`, which cannot emit. Its error leaves with the first element or timer."""
        try:
            yield
        except UserError as error:
            self._error = error

    def told(self, call: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """Yield what `call` yields. A user error is replaced by its line for the side output."""
        if self._error is None:
            try:
                yield from call()
            except UserError as error:
                self._error = error
        if self._error is not None and not self._told:
            self._told = True
            logger.error("the job ends: %s", self._error)
            yield USER_ERRORS, str(self._error)
