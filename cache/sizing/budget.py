"""Divides one budget of chunks among the slots of a job, each chunk to the slot where it gains most."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cache.sizing.gain_curve import GainCurve


@dataclass(frozen=True)
class SlotReport:
    """What a slot tells the others."""

    curve: GainCurve
    capacity_chunks: int
    """How many chunks its local tier may hold now."""


@dataclass(frozen=True)
class Budget:
    """The chunks that all slots may hold together, and the bounds for each slot."""

    chunks: int
    slots: int
    least_chunks: int
    greatest_chunks: int

    @property
    def even_chunks(self) -> int:
        """The capacity of a slot that does not know the reports of the others."""
        return max(self.least_chunks, min(self.chunks // self.slots, self.greatest_chunks))

    def share(self, reports: Mapping[int, SlotReport]) -> dict[int, int]:
        """Capacity of each reporting slot. Equal reports give equal results in every process.

        A slot only grows into free budget. A shrinking slot frees its chunks at its next lookup.
        """
        shares = self._by_gain({slot: report.curve for slot, report in reports.items()})
        free = self.chunks - sum(report.capacity_chunks for report in reports.values())
        for slot, share in shares.items():
            held = reports[slot].capacity_chunks
            if share > held:
                granted = max(0, min(share - held, free))
                free -= granted
                shares[slot] = max(self.least_chunks, held + granted)
        return shares

    def _by_gain(self, curves: Mapping[int, GainCurve]) -> dict[int, int]:
        """Each slot's minimum first, then the steepest steps of all curves; the rest is spread evenly.

        The steps of each curve decrease. So taking the steepest first gains the most hits per second for the budget.
        """
        shares = dict.fromkeys(sorted(curves), self.least_chunks)
        steps = [(step.gain, slot, step.chunks) for slot in shares for step in curves[slot].steps]
        steps.sort(key=lambda step: (-step[0], step[1]))
        # The minimum uses up the first steps of a curve, whatever they gain.
        given = dict.fromkeys(shares, self.least_chunks)
        left = self.chunks - sum(shares.values())
        for _, slot, wanted in steps:
            already = min(wanted, given[slot])
            given[slot] -= already
            granted = max(0, min(wanted - already, left, self.greatest_chunks - shares[slot]))
            shares[slot] += granted
            left -= granted
        self._spread(shares, left)
        return shares

    def _spread(self, shares: dict[int, int], chunks: int) -> None:
        for slot, among in zip(_by_share_descending(shares), range(len(shares), 0, -1), strict=True):
            granted = max(0, min(chunks // among, self.greatest_chunks - shares[slot]))
            shares[slot] += granted
            chunks -= granted


def _by_share_descending(shares: Mapping[int, int]) -> Iterable[int]:
    # Slots close to their maximum can take little, and leave more to the slots after them.
    return sorted(shares, key=lambda slot: (-shares[slot], slot))
