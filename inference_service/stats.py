"""What an engine has done so far, and what it holds now."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counters since the engine was made, then gauges."""

    passes: int = 0
    """Forward passes, including those that failed."""
    failed_passes: int = 0
    failed_stores: int = 0
    """Requests whose chunks could not be stored."""
    decode_passes: int = 0
    """Passes in which at least one sequence decoded."""
    decoded_tokens: int = 0
    """Tokens that these passes decoded, of all sequences. Divided by `decode_passes`: mean number of decoding rows."""
    prefilled_tokens: int = 0
    """Prompt tokens that were computed."""
    local_tokens: int = 0
    """Prompt tokens that came from the cache's local tier."""
    remote_tokens: int = 0
    """Prompt tokens that came from Redis."""

    waiting: int = 0
    prefilling: int = 0
    """Sequences with a part of their prompt computed."""
    running: int = 0
