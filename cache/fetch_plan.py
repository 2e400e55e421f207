"""Decides whether to fetch chunks from Redis or to compute them, by running averages of what both took."""

_WEIGHT = 0.3
"""Weight of the newest sample in the running averages."""
_EXPLORE_EVERY = 16
"""One of this many refused lookups uses Redis nevertheless, so that a bad average cannot disable it for ever."""
_EXPLORE_CHUNKS = 4
_DEADLINE_SHARE = 0.8
"""Fetches are planned to end within this share of the deadline, because missing it costs the connection."""


class FetchPlan:
    """Predicts the time of a fetch: `round_trip_ms * trips + ms_per_byte * bytes`. Unknown terms count as 0."""

    def __init__(self, chunk_tokens: int, record_bytes: int, deadline_ms: float) -> None:
        self._chunk_tokens = chunk_tokens
        self._record_bytes = record_bytes
        self._deadline_ms = deadline_ms
        self._refused = 0
        self._exploring = False
        self.round_trip_ms: float | None = None
        self.ms_per_byte: float | None = None

    def begin(self, chunks: int, prefill_ms_per_token: float | None) -> bool:
        """Decide whether to ask Redis for `chunks` chunks. One in `_EXPLORE_EVERY` refusals becomes an exploration."""
        self._exploring = False
        if self._worth(chunks, prefill_ms_per_token) > 0:
            return True
        self._refused += 1
        self._exploring = self._refused % _EXPLORE_EVERY == 0
        return self._exploring

    def chunks_to_fetch(self, available: int, prefill_ms_per_token: float | None) -> int:
        """How many of the `available` chunks, which Redis has, to fetch."""
        if self._exploring:
            return min(available, _EXPLORE_CHUNKS)
        return self._worth(available, prefill_ms_per_token)

    def observe_round_trip(self, took_ms: float) -> None:
        self.round_trip_ms = self._averaged(self.round_trip_ms, took_ms)

    def observe_transfer(self, size_bytes: int, took_ms: float) -> None:
        """`size_bytes` (above 0) arrived in `took_ms`, which includes one round trip."""
        net_ms = max(took_ms - (self.round_trip_ms or 0.0), 0.0)
        self.ms_per_byte = self._averaged(self.ms_per_byte, net_ms / size_bytes)

    def _worth(self, chunks: int, prefill_ms_per_token: float | None) -> int:
        chunk_ms = (self.ms_per_byte or 0.0) * self._record_bytes
        # One round trip asks for lengths, another fetches.
        fixed_ms = 2 * (self.round_trip_ms or 0.0)
        time_ms = self._deadline_ms * _DEADLINE_SHARE - fixed_ms
        if time_ms <= 0:
            return 0
        fitting = min(chunks, int(time_ms / chunk_ms)) if chunk_ms else chunks
        if prefill_ms_per_token is None:
            return fitting
        prefill_ms = fitting * self._chunk_tokens * prefill_ms_per_token
        return fitting if fixed_ms + fitting * chunk_ms < prefill_ms else 0

    def _averaged(self, average: float | None, sample: float) -> float:
        # An exploration is the first sample in a long time, so it replaces the average.
        if average is None or self._exploring:
            return sample
        return (1 - _WEIGHT) * average + _WEIGHT * sample
