"""A request before it is sent: its due time and its content."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from core.records import Request


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """A request that is due `at_ms` milliseconds after the load begins. Exactly one of the two prompts is set."""

    at_ms: float
    request_id: str
    session_id: str
    user_id: str
    max_new_tokens: int
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None

    def created(self, created_at_ms: float) -> Request:
        """Return the record to send; `created_at_ms` is Unix time."""
        return Request(
            request_id=self.request_id,
            session_id=self.session_id,
            user_id=self.user_id,
            max_new_tokens=self.max_new_tokens,
            created_at_ms=created_at_ms,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
        )


class Workload(Protocol):
    """Requests in the order of their `at_ms`. Each iteration begins anew and yields the same requests."""

    @property
    def requests(self) -> int:
        """Maximum number of requests."""
        ...

    def __iter__(self) -> Iterator[TimedRequest]: ...

    def adjustments(self) -> Mapping[str, int]:
        """Numbers of requests that the latest iteration has changed or left out so far, by name of the reason."""
        ...


class OfRun:
    """A workload whose request ids end in `run`. Without it a job would drop a second run's requests as copies."""

    def __init__(self, workload: Workload, run: str) -> None:
        self._workload = workload
        self._run = run

    @property
    def requests(self) -> int:
        return self._workload.requests

    def __iter__(self) -> Iterator[TimedRequest]:
        return (replace(timed, request_id=f"{timed.request_id}-{self._run}") for timed in self._workload)

    def adjustments(self) -> Mapping[str, int]:
        return self._workload.adjustments()


def request_id(workload: str, seed: int, index: int) -> str:
    return f"{workload}-{seed}-{index:06d}"
