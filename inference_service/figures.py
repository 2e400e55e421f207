"""What an engine has done, and holds, at one moment."""

from dataclasses import dataclass


@dataclass
class EngineFigures:
    """Counters since the engine was made, then the state of the moment."""

    passes: int = 0
    """Forward passes, those that failed included."""
    failed_passes: int = 0
    failed_stores: int = 0
    """Chunks of so many requests could not be kept."""
    decode_passes: int = 0
    """Passes in which sequences decoded."""
    decoded_tokens: int = 0
    """Tokens of all sequences in those; over `decode_passes` it is how many decoded together."""
    prefilled_tokens: int = 0
    """Prompt tokens that were computed."""
    local_tokens: int = 0
    """Prompt tokens that came from the cache's local tier."""
    remote_tokens: int = 0
    """Prompt tokens that came from Redis."""

    waiting: int = 0
    prefilling: int = 0
    """Sequences whose prompt is computed in part."""
    running: int = 0
