"""One budget of chunks for all slots of a job, each chunk where it gains most."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cache.sizing.gain_curve import GainCurve


@dataclass(frozen=True)
class SlotReport:
    """What one slot tells the others."""

    curve: GainCurve
    capacity_chunks: int
    """What its local tier may hold now."""


@dataclass(frozen=True)
class Budget:
    """What all slots may hold together, and the least and the greatest of each."""

    chunks: int
    slots: int
    least_chunks: int
    greatest_chunks: int

    @property
    def even_chunks(self) -> int:
        """A slot's capacity as long as it does not know of the others."""
        return max(self.least_chunks, min(self.chunks // self.slots, self.greatest_chunks))

    def share(self, reports: Mapping[int, SlotReport]) -> dict[int, int]:
        """Capacities of the slots that report, by slot: the same for the same reports, in every process.

        A slot grows into what nobody holds: who is to shrink still holds its chunks until its next look-up.
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
        """Each slot's least first, then the steepest steps; what nobody gains by is spread evenly.

        As the steps of a curve fall, the steepest first gain the most hits a second that so many chunks can.
        """
        shares = dict.fromkeys(sorted(curves), self.least_chunks)
        steps = [(step.gain, slot, step.chunks) for slot in shares for step in curves[slot].steps]
        steps.sort(key=lambda step: (-step[0], step[1]))
        # The least is made of a curve's first steps, whatever they gain.
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
    # Those that are the nearest to the greatest take the least of it, and leave the more to the others.
    return sorted(shares, key=lambda slot: (-shares[slot], slot))
