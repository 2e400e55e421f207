"""What the engine needs of a model and of what runs it, real or simulated."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from cache.protocol import ChunkShape
from inference_service.pieces import Piece


class Rows(Protocol):
    """Key/value memory for several sequences, a row each."""

    def load_chunk(self, row: int, index: int, chunk: torch.Tensor) -> None:
        """Copy a chunk to its position in `row`."""
        ...

    def read_chunk(self, row: int, index: int, out: torch.Tensor) -> None:
        """Copy chunk `index` of `row` to `out`."""
        ...

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of `source` over `target`."""
        ...

    def swap_rows(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first `tokens` positions of two rows."""
        ...


class ModelRunner(Protocol):
    """Forward passes over `rows` rows. Holds no request."""

    @property
    def rows(self) -> int: ...

    @property
    def pool(self) -> Rows: ...

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute the pieces, each of another row; the logits after the last token of each, `[pieces, vocabulary]`.

        Single tokens of the first rows, in the rows' order and before all other pieces, cost least.
        """
        ...


class ServedModel(Protocol):
    """A model as the engine sees it."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def device(self) -> Any:
        """Its `str` names the device in results."""
        ...

    @property
    def max_len(self) -> int:
        """Longest sequence, prompt and answer, in tokens."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    def chunk_shape(self, chunk_tokens: int) -> ChunkShape: ...

    def make_runner(self, rows: int, chunk_tokens: int) -> ModelRunner:
        """A runner with memory for `rows` sequences of up to `max_len` tokens."""
        ...

    def wait_for_device(self) -> None:
        """Return once the device has computed, and copied, all it was asked to: what was copied may then change."""
        ...
