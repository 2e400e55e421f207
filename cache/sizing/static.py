"""STATIC: a fixed capacity."""

from collections.abc import Sequence

from cache.config import SizingConfig


class Static:
    """`capacity_chunks`, always; the least and the greatest are for policies that change it."""

    def __init__(self, config: SizingConfig) -> None:
        self.capacity_chunks = config.capacity_chunks

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        return self.capacity_chunks
