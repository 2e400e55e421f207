"""Replay of a BurstGPT trace: its arrivals, its lengths, scaled, and its sessions; its prompts are made.

The trace says which calls are of one conversation, not what was said. A conversation is therefore taken to be one
text that grows: each prompt is as much of its beginning as the trace's length says. That is the most that prompts of
these lengths can share; where the trace's lengths fall (a history that was cut, a question that was asked anew), a
prompt is wholly the beginning of an earlier one, which real ones need not have been.
"""

from collections import Counter
from collections.abc import Iterator

from workloads.adjustments import OF_EVERY_REPLAY, OF_FAILED_CALLS
from workloads.burstgpt_trace import BurstGPTRow, read_burstgpt_trace
from workloads.length_replay import LengthReplay


class BurstGPTWorkload(LengthReplay):
    """Requests of a session share all that their lengths allow, all others nothing; none where there are no sessions.

    Nothing is remembered of a session: its name determines its tokens.
    """

    adjusts = (*OF_EVERY_REPLAY, *OF_FAILED_CALLS)

    def _rows(self, counts: Counter[str]) -> Iterator[BurstGPTRow]:
        options = self._config.burstgpt
        return read_burstgpt_trace(self._trace, options.failed_calls, self._config.replay.bad_rows, counts)
