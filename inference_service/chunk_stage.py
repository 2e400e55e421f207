"""Moves chunks between a GPU and ordinary memory: many at a time, through one buffer of pinned memory.

A chunk in a row of the pool is a strided tensor: copied alone from ordinary memory it costs a kernel, a transfer that
the driver stages and the host waits for, and both again for each of a prompt's chunks. Here the chunks of a prompt are
put side by side in pinned memory, cross in one transfer at the full speed of the bus, and one kernel spreads them over
the row; the other way round for those that are stored.
"""

from collections.abc import Callable, Sequence

import torch

from cache.protocol import ChunkShape

STAGE_BYTES = 32 << 20
"""Pinned memory of a stage, or one chunk where that is larger: enough that a transfer is not bound by its latency."""


class ChunkStage:
    """Between `device` and the host. For one thread; each call returns when the memory it was given may change."""

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
        """Copies chunk i, of `count`, to a tensor of the host; `spans` is as for `load`.

        Meant to be called with rising i: at the first chunk that the buffer lacks it takes that one and those after it
        from the device. What it reads is what the device holds by then.
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
        """Return when the device has done what it was asked to."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
