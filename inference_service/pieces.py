"""What a forward pass computes: pieces of sequences."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that follow each other, at least one: of its prompt, or the one that it sampled last."""

    row: int
    start: int
    """Tokens that the row holds before."""
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def leading_rows(pieces: Sequence[Piece]) -> int:
    """How many of the pieces, from the first on, are one token of the row of the same index."""
    in_place = (len(piece.tokens) == 1 and piece.row == index for index, piece in enumerate(pieces))
    return next((index for index, fits in enumerate(in_place) if not fits), len(pieces))
