"""Micro-batches: a batch closes at a number of items, or when its first item has waited long enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from core.clock import Clock

T = TypeVar("T")


class MicroBatcher(Generic[T]):
    """Collects items into batches. Each item leaves in exactly one batch. Time is an argument."""

    def __init__(self, batch_size: int, max_wait_ms: float) -> None:
        self._batch_size = batch_size
        self._max_wait_ms = max_wait_ms
        self._items: list[T] = []
        self._due_ms: float | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def due_ms(self) -> float | None:
        """Time at which the batch closes. None while it is empty."""
        return self._due_ms

    def add(self, item: T, now_ms: float) -> list[T]:
        """Add an item. Return the batch that it completes, else an empty list."""
        if not self._items:
            self._due_ms = now_ms + self._max_wait_ms
        self._items.append(item)
        return self.flush() if len(self._items) >= self._batch_size else []

    def expire(self, now_ms: float) -> list[T]:
        """Return the batch if its time has come, else an empty list."""
        return self.flush() if self._due_ms is not None and now_ms >= self._due_ms else []

    def flush(self) -> list[T]:
        """Close the batch and return its items, however few."""
        batch, self._items, self._due_ms = self._items, [], None
        return batch


class QueueDelay:
    """Measures how long requests queue in front of an operator that is busy with a batch."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queued_ms = 0.0
        self._taken_ms = 0.0
        self._busy = False

    def taken(self, since_ms: float) -> None:
        """The operator takes in a request that has queued since `since_ms` (wall time)."""
        self._taken_ms = self._clock.wall_ms()
        self._queued_ms = max(0.0, self._taken_ms - since_ms)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The operator takes in no request during this block."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self._taken_ms = self._clock.wall_ms()

    @property
    def queue_ms(self) -> float:
        """Queueing time of the latest request. 0 if no request came for a second while the operator was idle."""
        idle_ms = 0.0 if self._busy else self._clock.wall_ms() - self._taken_ms
        return self._queued_ms if idle_ms < 1000 else 0.0
