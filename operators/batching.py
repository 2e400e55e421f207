"""When a micro-batch is complete: at a count, or when its first item has waited long enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from core.clock import Clock

T = TypeVar("T")


class MicroBatcher(Generic[T]):
    """Collects items; time is an argument. Nothing is lost: an item leaves in exactly one batch."""

    def __init__(self, batch_size: int, max_wait_ms: float) -> None:
        self._batch_size = batch_size
        self._max_wait_ms = max_wait_ms
        self._items: list[T] = []
        self._due_ms: float | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def due_ms(self) -> float | None:
        """When the batch closes by time; none while it is empty."""
        return self._due_ms

    def add(self, item: T, now_ms: float) -> list[T]:
        """Take an item in; the batch that it completes, or nothing."""
        if not self._items:
            self._due_ms = now_ms + self._max_wait_ms
        self._items.append(item)
        return self.flush() if len(self._items) >= self._batch_size else []

    def expire(self, now_ms: float) -> list[T]:
        """The batch whose time has come, or nothing."""
        return self.flush() if self._due_ms is not None and now_ms >= self._due_ms else []

    def flush(self) -> list[T]:
        """All that waits, complete or not."""
        batch, self._items, self._due_ms = self._items, [], None
        return batch


class QueueDelay:
    """How long requests stand before they are taken in, while whoever takes them in is busy with a batch."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stood_ms = 0.0
        self._taken_ms = 0.0
        self._busy = False

    def taken(self, since_ms: float) -> None:
        """A request that has stood since then (wall time) is taken in."""
        self._taken_ms = self._clock.wall_ms()
        self._stood_ms = max(0.0, self._taken_ms - since_ms)

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self._taken_ms = self._clock.wall_ms()

    @property
    def queue_ms(self) -> float:
        """Queueing time of the latest request; 0 after an idle second without requests, when the queue is empty."""
        idle_ms = 0.0 if self._busy else self._clock.wall_ms() - self._taken_ms
        return self._stood_ms if idle_ms < 1000 else 0.0
