"""A `UserError` of a function leaves as a line that ends the job: see `pipelines.user_errors`."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import UserError
from operators.flink.rows import USER_ERRORS

logger = logging.getLogger(__name__)


class UserErrors:
    """The user errors of one function. The first one is all that leaves the function from then on."""

    def __init__(self) -> None:
        self._error: UserError | None = None
        self._told = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Run `open`, where nothing can leave yet: its error leaves with the first element or timer."""
        try:
            yield
        except UserError as error:
            self._error = error

    def told(self, call: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """What `call` yields. In place of a user error, its line to the side output."""
        if self._error is None:
            try:
                yield from call()
            except UserError as error:
                self._error = error
        if self._error is not None and not self._told:
            self._told = True
            logger.error("the job ends: %s", self._error)
            yield USER_ERRORS, str(self._error)
