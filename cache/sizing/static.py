"""STATIC: a fixed capacity."""

from collections.abc import Sequence

from cache.config import SizingConfig


class Static:
    """Always `capacity_chunks`. Its configured bounds apply only to policies that change the capacity."""

    def __init__(self, config: SizingConfig) -> None:
        self.capacity_chunks = config.capacity_chunks

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        return self.capacity_chunks
