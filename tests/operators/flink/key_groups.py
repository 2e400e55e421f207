"""Flink's mapping from INT keys to subtasks: its murmur hash, without a JVM."""

MAX_PARALLELISM = 128
"""Number of key groups of our jobs."""


def subtask_of(key: int, parallelism: int) -> int:
    """Index of the key's subtask, in `[0, parallelism)`."""
    return key_group(key) * parallelism // MAX_PARALLELISM


def key_group(key: int) -> int:
    """Key group of a key. PyFlink wraps the key in a row, and the hash of that row decides."""
    return _murmur(_wrapped(62 + key)) % MAX_PARALLELISM


def _murmur(code: int) -> int:
    """`MathUtils.murmurHash` of Flink."""
    code = _rotated(code * 0xCC9E2D51, 15)
    code = _rotated(code * 0x1B873593, 13)
    code = _wrapped(code * 5 + 0xE6546B64) ^ 4
    code = _wrapped((code ^ code >> 16) * 0x85EBCA6B)
    code = _wrapped((code ^ code >> 13) * 0xC2B2AE35)
    code ^= code >> 16
    # As in Java, where this is the absolute value of a signed number.
    return min(code, 2**32 - code) % 2**31


def _wrapped(number: int) -> int:
    return number % 2**32


def _rotated(number: int, bits: int) -> int:
    number = _wrapped(number)
    return _wrapped(number << bits) | number >> 32 - bits
