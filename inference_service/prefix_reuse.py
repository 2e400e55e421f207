"""Chunks between the cache and the rows of key/value memory."""

import logging
from collections.abc import Callable

from cache.protocol import KVCache
from inference_service.active_sequence import ActiveSequence
from inference_service.protocol import KVRows

logger = logging.getLogger(__name__)


class PrefixReuse:
    """Fills rows from a cache, and stores what was computed in it."""

    def __init__(self, cache: KVCache, memory: KVRows, chunk_tokens: int, wait_for_device: Callable[[], None]) -> None:
        self._cache = cache
        self._memory = memory
        self._chunk_tokens = chunk_tokens
        self._wait_for_device = wait_for_device

    def prefetch(self, sequence: ActiveSequence, prefill_ms_per_token: float | None) -> None:
        """Begin to fetch the chunks of a queued sequence from Redis."""
        request = sequence.request
        sequence.prefetch = self._cache.prefetch(
            sequence.prompt, request.cache_salt, prefill_ms_per_token, request.priority
        )

    def load(self, sequence: ActiveSequence) -> int:
        """Fill the row of a sequence; the number of prompt tokens that need no computing."""
        tokens = self._chunk_tokens
        with self._cache.lookup(sequence.prompt, sequence.request.cache_salt, sequence.prefetch) as found:
            sequence.capacity_chunks, sequence.used_chunks = found.capacity_chunks, found.used_chunks
            # The last prompt token is always computed: its logits are the first answer token's. Where the chunks
            # reach the very end, the last one counts one token less.
            limit = len(sequence.prompt) - 1
            if found.chunks:
                self._memory.load_chunks(sequence.row, found.chunks)
            for index, tier in enumerate(found.tiers):
                counted = min(tokens, limit - index * tokens)
                if tier == "local":
                    sequence.local_tokens += counted
                else:
                    sequence.remote_tokens += counted
            # The prefix's memory may change once it is released.
            self._wait_for_device()
        return sequence.local_tokens + sequence.remote_tokens

    def store(self, sequence: ActiveSequence) -> bool:
        """Keep the row's full chunks. Returns false if that failed: a miss later, and no fault of the request."""
        try:
            self._cache.store(
                sequence.tokens[: sequence.finite],
                self._memory.chunk_reader(sequence.row, sequence.finite),
                sequence.request.cache_salt,
            )
        except Exception:
            logger.exception("chunks of request %r could not be stored", sequence.request.request_id)
            return False
        return True

    def close(self) -> None:
        self._cache.close()
