"""Moves chunks between a GPU and ordinary memory: many at a time, through one buffer of pinned memory.

A chunk in a row of the pool is a strided tensor. To copy it alone from ordinary memory costs a kernel and a transfer
that the driver stages and the host waits for, for each chunk of a prompt. Here the chunks of a prompt are put side by
side in pinned memory and cross in one transfer at the full speed of the bus. One kernel then spreads them over the row.
Stored chunks take the opposite way.
"""

from collections.abc import Callable, Sequence

import torch

from cache.protocol import ChunkShape

STAGE_BYTES = 32 << 20
"""Pinned memory of a stage, unless one chunk is larger: enough that a transfer is not bound by its latency."""


class ChunkStage:
    """Copies chunks between `device` and the host. For one thread. The caller may change its memory after each call."""

    def __init__(self, shape: ChunkShape, device: torch.device, stage_bytes: int = STAGE_BYTES) -> None:
        self._device = device
        self._chunks = max(1, stage_bytes // shape.size_bytes)
        self._buffer = torch.empty(
            (self._chunks, *shape.size), dtype=shape.dtype, pin_memory=device.type == "cuda", device="cpu"
        )

    def load(self, chunks: Sequence[torch.Tensor], spans: Callable[[int, int], torch.Tensor]) -> None:
        """Copy `chunks` to the device. `spans(i, n)` is a view of the places of chunks i to i + n, `[n, *size]`."""
        for start in range(0, len(chunks), self._chunks):
            group = chunks[start : start + self._chunks]
            staged = torch.stack(list(group), out=self._buffer[: len(group)])
            spans(start, len(group)).copy_(staged.to(self._device, non_blocking=True))
            self._wait()

    def reader(self, count: int, spans: Callable[[int, int], torch.Tensor]) -> Callable[[int, torch.Tensor], None]:
        """A function that copies chunk i of `count` to a tensor of the host; `spans` is as for `load`.

        Call it with rising i: if the buffer lacks a chunk, it takes that one and those after it from the device, as
        they are at that moment.
        """
        held = range(0)

        def read(index: int, out: torch.Tensor) -> None:
            nonlocal held
            if index not in held:
                held = range(index, min(index + self._chunks, count))
                # The gather is on the device: what crosses is one block.
                gathered = spans(index, len(held)).contiguous()
                self._buffer[: len(held)].copy_(gathered, non_blocking=True)
                self._wait()
            out.copy_(self._buffer[index - held.start])

        return read

    def _wait(self) -> None:
        """Return when the device has finished."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
