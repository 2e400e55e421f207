"""A circuit breaker: after several failures in a row it blocks calls to a service, and later lets one probe through."""

import threading

from core.clock import Clock


class CircuitBreaker:
    """Closed until `failures` failures in a row, then open for `open_ms`, then half-open: one probe decides.

    Each `try_acquire` that returns true must be followed by exactly one `success` or `failure`. Thread-safe.
    """

    def __init__(self, failures: int, open_ms: float, clock: Clock) -> None:
        self._failures_to_open = failures
        self._open_ms = open_ms
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._opened_at_ms: float | None = None
        self._probing = False
        self._retired = False

    @property
    def is_open(self) -> bool:
        """True if a call would be refused now. False once a probe is due. Does not change the state."""
        with self._lock:
            if self._retired:
                return True
            return self._opened_at_ms is not None and (self._probing or not self._probe_due(self._opened_at_ms))

    def try_acquire(self) -> bool:
        """True if the caller may call the service now."""
        with self._lock:
            if self._retired:
                return False
            if self._opened_at_ms is None:
                return True
            if self._probing or not self._probe_due(self._opened_at_ms):
                return False
            self._probing = True
            return True

    def success(self) -> None:
        """The service answered. Closes the breaker and resets the failures."""
        with self._lock:
            self._failures = 0
            self._opened_at_ms = None
            self._probing = False

    def failure(self) -> bool:
        """The service failed. True if this opened the breaker, or kept it open after a probe."""
        with self._lock:
            self._failures += 1
            if self._failures < self._failures_to_open and not self._probing:
                return False
            self._opened_at_ms = self._clock.monotonic_ms()
            self._probing = False
            return True

    def retire(self) -> None:
        """Refuse all calls from now on: the service cannot be used at all."""
        with self._lock:
            self._retired = True

    def _probe_due(self, opened_at_ms: float) -> bool:
        return self._clock.monotonic_ms() - opened_at_ms >= self._open_ms
