"""The line through the second half of a series, and how well it fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trend:
    """A least-squares line from `begin_s` on."""

    begin_s: float
    begin_mib: float
    slope_mib_per_h: float
    error_mib_per_h: float
    """Standard error of the slope, for independent samples."""
    scatter_mib: float
    """Standard deviation of the samples from the line."""

    @classmethod
    def of_second_half(cls, seconds: Sequence[float], mib: Sequence[float]) -> "Trend | None":
        """Fit the line to the second half; none if it has fewer than three samples."""
        half_s = (seconds[0] + seconds[-1]) / 2
        hours = np.array([(at - half_s) / 3600 for at in seconds if at >= half_s])
        values = np.array(mib[len(mib) - len(hours) :])
        if len(hours) < 3:
            return None
        slope, begin = np.polyfit(hours, values, 1)
        scatter = float(np.sqrt(np.sum((values - begin - slope * hours) ** 2) / (len(hours) - 2)))
        error = scatter / float(np.sqrt(np.sum((hours - hours.mean()) ** 2)))
        return cls(half_s, float(begin), float(slope), error, scatter)

    def at(self, second: float) -> float:
        """MiB of the line at `second`."""
        return self.begin_mib + self.slope_mib_per_h * (second - self.begin_s) / 3600
