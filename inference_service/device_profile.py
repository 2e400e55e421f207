"""The times of one model on one device, as a roofline: rates of arithmetic and memory, and fixed costs of a pass.

A forward pass takes as long as the slower of its arithmetic and its memory traffic (roofline model: Williams, Waterman
and Patterson, CACM 52(4), 2009), after overheads that depend on neither. Weights, and the keys and values that
attention gathers, have rates of their own. `benchmarks/engine.py` measures the parameters and writes them as JSON; the
simulated device reads them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError

from core.config import Config
from core.errors import UserError, one_line
from inference_service.config import DTYPES


class DeviceProfile(Config):
    """One device that runs one model. A rate that is none (`null`) is infinite."""

    device: str = Field(min_length=1, description="name of the device")
    model: str = Field(min_length=1, description="name of the model")
    dtype: str = Field(pattern=f"^({'|'.join(DTYPES)})$", description="data type of weights, keys and values")
    measured: bool = Field(description="true: measured on the device; false: set by hand")
    source: str = Field(description="what made this profile")

    parameters: int = Field(ge=0, description="weights of the model, each counted once")
    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    max_model_len: int = Field(ge=2, description="longest sequence that the model takes, in tokens")

    weight_bytes: int = Field(ge=0, description="weights that every forward pass reads, without embedding rows")
    kv_bytes_per_token: int = Field(ge=0, description="keys and values of one token in all layers")
    flops_per_token: int = Field(ge=0, description="operations of the layers' matrices per token of a pass")
    head_flops: int = Field(ge=0, description="operations of the output matrix per row of a pass")
    attention_flops: int = Field(ge=0, description="operations per pair of a query token and a token it attends to")

    flops_per_s: float | None = Field(gt=0, description="reached rate of arithmetic")
    bytes_per_s: float | None = Field(gt=0, description="rate at which weights are read")
    kv_bytes_per_s: float | None = Field(gt=0, description="rate at which keys and values are read")
    prefill_overhead_ms: float = Field(ge=0, description="fixed cost of a prefill pass")
    decode_overhead_ms: float = Field(ge=0, description="fixed cost of a decode step")
    decode_row_overhead_ms: float = Field(ge=0, description="fixed cost of each row in a decode step")

    def pass_ms(self, lengths: Sequence[int], spans: Sequence[tuple[int, int]] = ()) -> float:
        """Time of one pass over one token in each of the first rows, which hold `lengths` tokens, and over `spans`.

        A span `(tokens, start)` computes `tokens` tokens of a further row that already holds `start` tokens.

        The time is `overhead_ms + max(flops / flops_per_s, weight_bytes / bytes_per_s + kv_bytes / kv_bytes_per_s)`.
        The weights are read once, and each row once. The first rows are read up to the end of the longest, masked:
        `held = rows * (max(lengths) + 1)` positions. Token i of a span attends to `start + i + 1` positions. Logits are
        computed for the last token of each row:
        flops = all tokens * flops_per_token + all rows * head_flops + attention_flops * (held + the spans' pairs),
        kv_bytes = kv_bytes_per_token * (held + the spans' start + tokens),
        overhead_ms = the greater of `prefill_overhead_ms` (with spans) and `decode_overhead_ms` (with rows), plus
        `decode_row_overhead_ms` per row.
        """
        rows = len(lengths)
        held = rows * (max(lengths, default=0) + 1)
        tokens = rows + sum(count for count, _ in spans)
        pairs = held + sum(count * start + count * (count + 1) // 2 for count, start in spans)
        read = held + sum(count + start for count, start in spans)
        flops = tokens * self.flops_per_token + (rows + len(spans)) * self.head_flops + self.attention_flops * pairs
        fixed_ms = max(self.decode_overhead_ms if rows else 0.0, self.prefill_overhead_ms if spans else 0.0)
        return fixed_ms + rows * self.decode_row_overhead_ms + self._slower_ms(flops, self.kv_bytes_per_token * read)

    def prefill_ms(self, tokens: int, start: int) -> float:
        """Time to compute `tokens` tokens of a row that already holds `start`."""
        return self.pass_ms((), [(tokens, start)])

    def decode_ms(self, lengths: Sequence[int]) -> float:
        """Time of one token in each of the rows, which hold `lengths` tokens."""
        return self.pass_ms(lengths)

    def _slower_ms(self, flops: int, kv_bytes: int) -> float:
        memory_s = _seconds(self.weight_bytes, self.bytes_per_s) + _seconds(kv_bytes, self.kv_bytes_per_s)
        return 1e3 * max(_seconds(flops, self.flops_per_s), memory_s)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the profile in `path`. Raises `UserError` if there is none."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            reason = error.strerror or type(error).__name__
        except ValidationError as error:
            reason = one_line(error)
        raise UserError(f"--profile: cannot read {path}: {reason}; name a file that benchmarks/engine.py wrote")

    @classmethod
    def instant(cls, max_model_len: int = 32_768) -> Self:
        """A device on which every pass takes no time, to measure the cost of everything around it."""
        return cls(
            device="instant",
            model="instant",
            dtype="float32",
            measured=False,
            source="set to take no time",
            parameters=0,
            layers=1,
            kv_heads=1,
            head_dim=1,
            vocab_size=256,
            max_model_len=max_model_len,
            weight_bytes=0,
            kv_bytes_per_token=0,
            flops_per_token=0,
            head_flops=0,
            attention_flops=0,
            flops_per_s=None,
            bytes_per_s=None,
            kv_bytes_per_s=None,
            prefill_overhead_ms=0.0,
            decode_overhead_ms=0.0,
            decode_row_overhead_ms=0.0,
        )


def _seconds(amount: int, per_s: float | None) -> float:
    return 0.0 if per_s is None else amount / per_s
