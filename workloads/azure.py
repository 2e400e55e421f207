"""Replay of an Azure trace: its arrivals and lengths, scaled. Prompts are generated, because the trace has none."""

from collections import Counter
from collections.abc import Iterator

from workloads.azure_trace import AzureRow, read_azure_trace
from workloads.length_replay import LengthReplay


class AzureWorkload(LengthReplay):
    """Requests share nothing, because the trace does not name sessions."""

    def _rows(self, counts: Counter[str]) -> Iterator[AzureRow]:
        return read_azure_trace(self._trace, self._config.replay.bad_rows, counts)
