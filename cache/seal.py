"""Seals: the last 16 bytes of a record's header, which reveal damaged or forged chunks.

A checksum reveals damage. Anyone who can write to Redis can compute one, so forgery needs a code with a secret key.
"""

import hashlib
import hmac
from typing import Protocol

import xxhash
from pydantic import SecretStr

from cache.payload import Buffer

SEAL_BYTES = 16
_NAME_OF_A_KEY = b"infertuner: the name of a key that authenticates chunks"
"""No record begins with this text, so the name of a key cannot be the seal of a record."""


class Seal(Protocol):
    """One way to seal records."""

    key_name: str | None
    """Part of the keys of chunks, so that each secret key has chunks of its own. Does not reveal the secret key.

    None if the seal has no secret key."""

    def of(self, fields: Buffer, payload: Buffer) -> bytes:
        """The seal, of `SEAL_BYTES`, over the header's `fields` and then the `payload` of a record."""
        ...


class Checksum:
    """xxh3-128: reveals damage."""

    key_name: str | None = None

    def of(self, fields: Buffer, payload: Buffer) -> bytes:
        digest = xxhash.xxh3_128(fields)
        digest.update(payload)
        return digest.digest()


class Authentication:
    """HMAC-SHA256 with a secret key, cut to 128 bits (RFC 2104): also reveals records without that key's seal."""

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
    """`Authentication` with `key`, or `CHECKSUM` without one."""
    return CHECKSUM if key is None else Authentication(key)
