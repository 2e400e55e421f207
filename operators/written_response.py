"""The form in which a response crosses from the slot's process to Flink's worker.

The slot's process writes the JSON because the worker is the busier of the two: all records of the slot pass through its
one interpreter. Only the time at which the answer leaves the job is added in the worker.
"""

from typing import NamedTuple

from core.records import FinishReason, Response

_UNKNOWN = frozenset({"completed_at_ms", "e2e_ms"})
"""Fields that depend on when the answer leaves."""


class WrittenResponse(NamedTuple):
    """The JSON of a response without the fields of `_UNKNOWN`, and the fields that metrics read. Times are in ms."""

    head: str
    """The JSON object without its last brace."""
    request_id: str
    finish_reason: FinishReason
    local_tokens: int
    remote_tokens: int
    computed_tokens: int
    output_tokens: int
    created_at_ms: float
    completed_at_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    wait_ms: float

    @classmethod
    def of(cls, response: Response) -> "WrittenResponse":
        return cls(
            response.to_json(without=_UNKNOWN)[:-1],
            response.request_id,
            response.finish_reason,
            response.local_tokens,
            response.remote_tokens,
            response.computed_tokens,
            response.output_tokens,
            response.created_at_ms,
            response.completed_at_ms,
            response.ttft_ms,
            response.tpot_ms,
            response.wait_ms,
        )

    @property
    def e2e_ms(self) -> float:
        return self.completed_at_ms - self.created_at_ms

    def leaving(self, at_ms: float) -> "WrittenResponse":
        """The same response with the time at which it leaves (wall time)."""
        # A third of the cost of `_replace`.
        return WrittenResponse._make((*self[:_COMPLETED], at_ms, *self[_COMPLETED + 1 :]))

    def to_json(self) -> str:
        """The whole response, like `Response.to_json` with the fields in another order."""
        return f'{self.head},"completed_at_ms":{self.completed_at_ms!r},"e2e_ms":{self.e2e_ms!r}}}'


_COMPLETED = WrittenResponse._fields.index("completed_at_ms")
