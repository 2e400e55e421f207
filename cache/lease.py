"""The prefix that a look-up found, held in place until it is released."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

import torch

Source = Literal["local", "remote"]


class PrefixLease:
    """The `cache.protocol.Lease` of a `TwoLevelCache`."""

    def __init__(
        self,
        chunks: Sequence[torch.Tensor],
        sources: Sequence[Source],
        capacity_chunks: int,
        used_chunks: int,
        on_release: Callable[[], None],
    ) -> None:
        self.chunks = chunks
        self.sources = sources
        self.local_chunks = sources.count("local")
        self.remote_chunks = sources.count("remote")
        self.capacity_chunks = capacity_chunks
        self.used_chunks = used_chunks
        self._on_release: Callable[[], None] | None = on_release

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let the chunks go: `chunks` is empty from now on. Idempotent."""
        if self._on_release is not None:
            self._on_release()
            self._on_release = None
            self.chunks = ()
