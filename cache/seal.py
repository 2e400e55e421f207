"""The last 16 bytes of a record's header: what tells a chunk of ours from one that was damaged, or made by another.

A checksum tells damage. Whoever can write to Redis can make one, too: only a code that takes a key tells forgery.
"""

import hashlib
import hmac
from typing import Protocol

import xxhash
from pydantic import SecretStr

from cache.payload import Buffer

SEAL_BYTES = 16
_NAME_OF_A_KEY = b"infertuner: the name of a key that authenticates chunks"
"""No record begins with it, so that a key's name is no record's seal."""


class Seal(Protocol):
    """One way to seal records."""

    key_name: str | None
    """What keeps its chunks apart from others' in their keys; tells nothing of its key. None: it has no key."""

    def of(self, fields: Buffer, payload: Buffer) -> bytes:
        """`SEAL_BYTES` over a record: its header's `fields`, then its `payload`."""
        ...


class Checksum:
    """xxh3-128: damage shows."""

    key_name: str | None = None

    def of(self, fields: Buffer, payload: Buffer) -> bytes:
        digest = xxhash.xxh3_128(fields)
        digest.update(payload)
        return digest.digest()


class Authentication:
    """HMAC-SHA256 under a secret key, cut to 128 bits (RFC 2104): what was not sealed with that key shows."""

    def __init__(self, key: SecretStr) -> None:
        self._keyed = hmac.new(key.get_secret_value().encode(), digestmod=hashlib.sha256)
        name = self._keyed.copy()
        name.update(_NAME_OF_A_KEY)
        self.key_name: str | None = name.hexdigest()

    def of(self, fields: Buffer, payload: Buffer) -> bytes:
        code = self._keyed.copy()
        code.update(fields)
        code.update(payload)
        return code.digest()[:SEAL_BYTES]


CHECKSUM = Checksum()


def make_seal(key: SecretStr | None) -> Seal:
    """The seal of those who have `key`, or of those who have none."""
    return CHECKSUM if key is None else Authentication(key)
