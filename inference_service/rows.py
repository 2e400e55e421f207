"""Which sequence has which row of the key/value memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from inference_service.active_sequence import ActiveSequence

if TYPE_CHECKING:
    from inference_service.protocol import KVRows


class RowTable:
    """Running sequences have the first rows, without gaps, so that they decode in place.

    A sequence whose prompt is computed in part has any other row until it runs.
    """

    def __init__(self, memory: "KVRows", count: int) -> None:
        self.memory = memory
        self.count = count
        self.running: list[ActiveSequence] = []
        """The sequence at index i has row i."""
        self.prefilling: list[ActiveSequence] = []
        """In the order in which they began."""

    def __iter__(self) -> Iterator[ActiveSequence]:
        yield from self.prefilling
        yield from self.running

    def join(self, sequence: ActiveSequence) -> None:
        """Move a sequence whose prompt is computed to the row after the running ones."""
        self.prefilling.remove(sequence)
        target = len(self.running)
        if sequence.row != target:
            other = next((other for other in self.prefilling if other.row == target), None)
            if other is None:
                self.memory.move_row(sequence.row, target, sequence.held)
            else:
                self.memory.swap_rows(sequence.row, sequence.held, target, other.held)
                # The end of the longer sequence stays behind. It is not known to be finite before its own check.
                doubtful = max(sequence.held, other.finite)
                if doubtful < other.touched:
                    self.memory.clear(target, doubtful, other.touched)
                other.row = sequence.row
            sequence.row = target
        self.running.append(sequence)

    def remove(self, sequence: ActiveSequence) -> None:
        """Free the row of a sequence. The last running sequence moves into the gap."""
        self._clear_doubtful(sequence)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        if sequence not in self.running:
            return
        last = self.running.pop()
        if last is not sequence:
            self.memory.move_row(last.row, sequence.row, last.held)
            self._clear_doubtful(last)
            last.row = sequence.row
            self.running[last.row] = last

    def copy_prompt(self, target: ActiveSequence) -> int:
        """Copy the prompt's keys and values, but for its last token, from another choice of the same request.

        Returns the number of tokens: 0 unless another choice runs.
        """
        # The prompt of a sequence that runs is known to be finite.
        source = next((one for one in self.running if one.parent is target.parent), None)
        if source is None:
            return 0
        tokens = len(target.prompt) - 1
        self.memory.move_row(source.row, target.row, tokens)
        return tokens

    def check_finite(self, sequence: ActiveSequence) -> bool:
        """Check the keys and values that were computed since the last check.

        They can be infinite, or outside of a window, without a trace in the logits.
        """
        if not self.memory.is_finite(sequence.row, sequence.finite, sequence.held):
            return False
        sequence.finite = sequence.held
        return True

    def _clear_doubtful(self, sequence: ActiveSequence) -> None:
        """Clear the positions of a row that may not be finite.

        The next sequence in the row reads all of it if a longer sequence runs beside it: attention masks foreign
        positions by adding to their scores, and NaN plus anything is NaN.
        """
        if sequence.finite < sequence.touched:
            self.memory.clear(sequence.row, sequence.finite, sequence.touched)
