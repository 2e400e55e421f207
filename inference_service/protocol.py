"""The model, its key/value memory and its forward passes as the engine sees them, real or simulated."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from cache.protocol import ChunkShape
    from inference_service.active_sequence import Piece
    from inference_service.generation_defaults import GenerationDefaults
    from inference_service.grammar_compiler import Grammars
    from inference_service.prompt_encoder import PromptEncoder


class KVRows(Protocol):
    """Key/value memory for several sequences, a row each."""

    def load_chunks(self, row: int, chunks: Sequence["torch.Tensor"]) -> None:
        """Copy chunks to the beginning of `row`, one after the other."""
        ...

    def chunk_reader(self, row: int, tokens: int) -> Callable[[int, "torch.Tensor"], None]:
        """A function that copies chunk i of `row`, which holds `tokens`, to a tensor. Call it with rising i."""
        ...

    def is_finite(self, row: int, start: int, end: int) -> bool:
        """True if all keys and values from position `start` to before `end` of `row` are finite."""
        ...

    def clear(self, row: int, start: int, end: int) -> None:
        """Write zeros to `row`, from position `start` to before `end`."""
        ...

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of `source` over `target`."""
        ...

    def swap_rows(self, one: int, one_tokens: int, other: int, other_tokens: int) -> None:
        """Exchange two rows, of which the first `one_tokens` and `other_tokens` positions count."""
        ...


class ModelRunner(Protocol):
    """Forward passes over `rows` rows. Holds no request."""

    @property
    def rows(self) -> int: ...

    @property
    def pool(self) -> KVRows: ...

    def forward(self, pieces: Sequence["Piece"]) -> "torch.Tensor":
        """Compute the pieces, each of another row; logits `[logit rows, vocabulary]`, in the order of the pieces.

        They are the logits after the last token of each piece, or after each of its tokens if it is `scored`. Single
        tokens of the first rows, in the rows' order and before all other pieces, cost least.
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
    def own_limit(self) -> str | None:
        """The limit of the model that `max_len` is; none if `max_model_len` could raise it."""
        ...

    @property
    def prompt_encoder(self) -> "PromptEncoder": ...

    @property
    def grammars(self) -> "Grammars":
        """Grammars for answers in a format. The first takes seconds if the vocabulary is large. Raises `UserError`."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    @property
    def generation(self) -> "GenerationDefaults":
        """Sampling parameters for what a request does not say."""
        ...

    def chunk_shape(self, chunk_tokens: int) -> "ChunkShape": ...

    def make_runner(self, rows: int, chunk_tokens: int) -> ModelRunner:
        """A runner with memory for `rows` sequences of up to `max_len` tokens."""
        ...

    def wait_for_device(self) -> None:
        """Return once the device has finished all computing and copying. The sources of copies may then change."""
        ...
