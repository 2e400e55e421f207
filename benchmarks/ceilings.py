"""Both sides of a roofline: the largest rates of a device, and the work that one forward pass of a model needs.

Needs only PyTorch and NumPy, so it runs on a machine that has nothing else.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from inference_service.packed_linear import pack_linears

LARGEST_BUFFER_BYTES = 4 << 30
SMALLEST_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Work:
    """Least arithmetic and memory traffic of one forward pass."""

    flops: int
    weight_bytes: int
    kv_bytes: int
    decode_rows: int = 0
    """Rows of a decode step; 0 for a prefill."""

    @property
    def moved_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def floor_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Lower bound of the duration by the roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009)."""
        return max(self.flops / flops_per_s, self.moved_bytes / bytes_per_s)


@dataclass(frozen=True)
class ModelCosts:
    """Arithmetic and memory traffic of a decoder-only transformer. Names and units are those of a device profile."""

    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    head_flops: int
    attention_flops: int

    def prefill(self, tokens: int, start: int) -> Work:
        """Work of `tokens` tokens after `start`. Each attends to itself and to all tokens before it."""
        pairs = tokens * start + tokens * (tokens + 1) // 2
        return Work(
            tokens * self.flops_per_token + self.head_flops + self.attention_flops * pairs,
            self.weight_bytes,
            self.kv_bytes_per_token * (start + tokens),
        )

    def decode(self, lengths: Sequence[int]) -> Work:
        """Work of one token in each row. The pool gives every row up to the end of the longest."""
        rows = len(lengths)
        held = rows * (max(lengths) + 1)
        return Work(
            rows * (self.flops_per_token + self.head_flops) + self.attention_flops * held,
            self.weight_bytes,
            self.kv_bytes_per_token * held,
            rows,
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean device time of `call` over `repeats` calls without waits between them."""
    synchronize(device)
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        began, ended = event(enable_timing=True), event(enable_timing=True)
        began.record()
        for _ in range(repeats):
            call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3 / repeats
    began_s = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began_s) / repeats


class Ceilings:
    """The largest rates that plain kernels reach. Every call measures again."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, products: Sequence[tuple[int, int, int]], read_bytes: int
    ) -> None:
        """`products` are the rows, inner and outer size of each matrix product, computed as in a layer.

        `read_bytes` is what a decode step reads. The bandwidth is measured over a buffer of that size (within bounds),
        so it profits from the device's caches as much as the step could.
        """
        self._device = device
        self._repeats = 10 if device.type == "cuda" else 1
        self._products = {
            (rows, inner, outer): (
                torch.randn(rows, inner, device=device).to(dtype),
                _layer(inner, outer, device, dtype),
            )
            for rows, inner, outer in products
        }
        self.buffer_bytes = max(SMALLEST_BUFFER_BYTES, min(read_bytes, LARGEST_BUFFER_BYTES))
        half = torch.randn(self.buffer_bytes // 8, device=device)
        self._halves = half, torch.randn_like(half)

    @torch.inference_mode()
    def flops_per_s(self) -> dict[str, float]:
        """Rate of each product, by its sizes. A product has 2 * rows * inner * outer operations."""
        rates = {}
        for (rows, inner, outer), (factor, layer) in self._products.items():
            took_s = seconds_of(partial(layer, factor), self._repeats, self._device)
            rates[f"{rows}x{inner}x{outer}"] = 2 * rows * inner * outer / took_s
        return rates

    @torch.inference_mode()
    def bytes_per_s(self) -> dict[str, float]:
        """Bandwidth of `copy` (one half to the other, bytes read and written) and of `read` (dot product)."""
        source, target = self._halves
        moved = 2 * source.numel() * source.element_size()
        kernels: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(source),
            "read": lambda: torch.dot(source, target),
        }
        return {name: moved / seconds_of(kernel, self._repeats, self._device) for name, kernel in kernels.items()}


def _layer(inner: int, outer: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Sequential:
    """Return a layer as the engine computes it, so that the ceiling is not below what the engine's kernels reach."""
    layer = torch.nn.Sequential(torch.nn.Linear(inner, outer, bias=False, device=device, dtype=dtype))
    pack_linears(layer)
    return layer


def free_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            named = dict(line.split(":", 1) for line in lines)
        return int(named["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Fit:
    """Measured parameters of a device profile, and the error of the times it predicts."""

    flops_per_s: float
    bytes_per_s: float
    kv_bytes_per_s: float
    prefill_overhead_ms: float
    decode_overhead_ms: float
    decode_row_overhead_ms: float
    worst_error_percent: float
    """Largest difference between predicted and measured time, in percent of the measured time."""


def fit(works: Sequence[Work], times_ms: Sequence[float], bytes_per_s: float) -> Fit:
    """Fit a device profile's formula by least squares of relative errors:

    `overheads + max(flops / flops_per_s, weight_bytes / bytes_per_s + kv_bytes / kv_bytes_per_s)`. Every pass of a
    model reads the same weights, so their time cannot be separated from a fixed cost. They are assumed to be read at
    `bytes_per_s`, the ceiling (or at the rate of the fastest pass, if that is higher); the rest is overhead. For given
    rates the overheads follow directly. The rates are searched on a grid that is narrowed around the best point.
    """
    times = np.array(times_ms)
    # Operations, bytes of keys and values, and bytes of weights, each over the measured time.
    flops, kv_bytes, weights = np.array([[work.flops, work.kv_bytes, work.weight_bytes] for work in works]).T / times
    reached = max(bytes_per_s, 1e3 * weights.max())
    rows = np.array([work.decode_rows for work in works])
    fixed = {"prefill": (rows == 0) / times, "step": (rows > 0) / times, "row": rows / times}
    # Least squares may give a negative overhead. It is then left out, and the others are solved again.
    subsets = [("prefill",), ("prefill", "step"), ("prefill", "row"), ("prefill", "step", "row")]

    def solved(rates: Any) -> tuple[Any, list[tuple[tuple[str, ...], Any, Any]]]:
        """For ms per operation and per byte `[candidates, 2]`: the least squared error, and all solutions tried."""
        base = np.maximum(rates[:, :1] * flops, 1e3 / reached * weights + rates[:, 1:] * kv_bytes)
        tried = []
        for names in subsets:
            matrix = np.stack([fixed[name] for name in names], axis=1)
            overheads = np.maximum(0.0, (1 - base) @ np.linalg.pinv(matrix).T)
            tried.append((names, overheads, base + overheads @ matrix.T - 1))
        return np.stack([(errors**2).sum(1) for _, _, errors in tried]), tried

    # No pass is faster than each of its parts, so the smallest time per unit over all passes bounds each rate.
    centre, reach = -np.log([flops.max(), kv_bytes.max()]), 3.0
    for _ in range(10):
        axis = np.linspace(-reach, reach, 41)
        grid = centre + np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
        centre = grid[np.argmin(solved(np.exp(grid))[0].min(axis=0))]
        reach /= 5
    squares, tried = solved(np.exp(centre)[None])
    names, overheads, errors = tried[int(np.argmin(squares[:, 0]))]
    found = dict(zip(names, overheads[0].tolist(), strict=True))
    return Fit(
        flops_per_s=float(1e3 / np.exp(centre[0])),
        bytes_per_s=float(reached),
        kv_bytes_per_s=float(1e3 / np.exp(centre[1])),
        prefill_overhead_ms=found["prefill"],
        decode_overhead_ms=found.get("step", 0.0),
        decode_row_overhead_ms=found.get("row", 0.0),
        worst_error_percent=float(100 * np.abs(errors).max()),
    )
