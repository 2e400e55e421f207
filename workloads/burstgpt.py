"""Replay of a BurstGPT trace: its arrivals, sessions and lengths, scaled. Prompts are generated.

The trace says which calls belong to one conversation, but has no text. So a conversation is taken to be one growing
text, and each prompt is the beginning of it, as long as the trace says. This is the most that prompts of these lengths
can share. If lengths fall within a session (the history was cut, a question was asked again), a prompt is wholly the
beginning of an earlier one. The real prompt need not have been.
"""

from collections import Counter
from collections.abc import Iterator

from workloads.adjustments import OF_EVERY_REPLAY, OF_FAILED_CALLS
from workloads.burstgpt_trace import BurstGPTRow, read_burstgpt_trace
from workloads.length_replay import LengthReplay


class BurstGPTWorkload(LengthReplay):
    """Requests of a session share as much as their lengths allow; other requests share nothing.

    A session's name determines its tokens, so no session has to be remembered.
    """

    adjusts = (*OF_EVERY_REPLAY, *OF_FAILED_CALLS)

    def _rows(self, counts: Counter[str]) -> Iterator[BurstGPTRow]:
        options = self._config.burstgpt
        return read_burstgpt_trace(self._trace, options.failed_calls, self._config.replay.bad_rows, counts)
