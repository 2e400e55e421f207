"""Replay of an Azure trace: its arrivals and its lengths, scaled; its prompts are made, as the trace has none."""

from collections.abc import Iterator, Mapping
from datetime import timedelta

from workloads.azure_trace import AzureRow, read_azure_trace
from workloads.config import LongPrompts, WorkloadConfig, WorkloadKind, trace_file
from workloads.timed_request import TimedRequest, request_id
from workloads.token_ids import made_token_ids


class AzureWorkload:
    """The first `config.requests` requests of the trace that fit `max_prompt_tokens`.

    Arrivals are the trace's, divided by `time_scale` and counted from its first row. Requests share nothing, and each
    is a session and a user of its own, as the trace says nothing of either.
    """

    def __init__(self, config: WorkloadConfig) -> None:
        self._config = config
        self._trace = trace_file(config)
        self._skipped = 0
        self._cut = 0

    @property
    def requests(self) -> int:
        return self._config.requests

    def adjustments(self) -> Mapping[str, int]:
        return {"skipped_long_prompts": self._skipped, "cut_long_prompts": self._cut}

    def __iter__(self) -> Iterator[TimedRequest]:
        config = self._config
        self._skipped = self._cut = 0
        index = 0
        began = None
        for row in read_azure_trace(self._trace):
            began = began or row.timestamp
            prompt_tokens = self._prompt_tokens(row)
            if prompt_tokens is None:
                continue
            yield TimedRequest(
                at_ms=(row.timestamp - began) / timedelta(milliseconds=1) / config.replay.time_scale,
                request_id=request_id(WorkloadKind.AZURE, config.seed, index),
                session_id=f"user-{index + 1:06d}/s1",
                user_id=f"user-{index + 1:06d}",
                max_new_tokens=_scaled(row.generated_tokens, config.replay.output_scale, config.max_new_tokens),
                prompt_token_ids=made_token_ids(config.seed, index, prompt_tokens, config.vocab_size),
            )
            index += 1
            if index == config.requests:
                return

    def _prompt_tokens(self, row: AzureRow) -> int | None:
        """Length of the row's prompt; none where it is too long and such are skipped."""
        limit = self._config.max_prompt_tokens
        scale = self._config.azure.prompt_scale
        if round(row.context_tokens * scale) > limit:
            if self._config.replay.long_prompts is LongPrompts.SKIP:
                self._skipped += 1
                return None
            self._cut += 1
        return _scaled(row.context_tokens, scale, limit)


def _scaled(tokens: int, scale: float, limit: int) -> int:
    return min(max(round(tokens * scale), 1), limit)
