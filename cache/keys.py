"""Keys of chunks. A key depends on the model, the tenant, and all tokens up to the end of the chunk.

`h0 = sha256(length-prefixed, tagged fields)` and `h(i) = sha256(h(i-1) || tokens of chunk i as little-endian u32)`. A
key thus names a chunk together with everything before it, on which its key/value tensors depend. Keys depend on content
only: every process computes the same keys, whatever its PYTHONHASHSEED.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache.config import RemoteCodec
from cache.protocol import ChunkShape, ModelIdentity

SCHEMA_VERSION = 1
"""Part of every key. A new meaning of keys or tensors needs a new number. Old entries are then never found."""

TOKEN_BYTES = 4


@dataclass(frozen=True)
class PromptKeys:
    """The keys of one prompt's full chunks, in order."""

    fingerprint: bytes
    """`h0`, 32 bytes: model, layout, codec, key of the seal and tenant."""
    hashes: tuple[bytes, ...]
    """`h1, h2, ...`, 32 bytes each: one for each full chunk."""


class KeySchema:
    """Makes the keys of one model's chunks for one codec and seal. Calls change nothing."""

    def __init__(
        self,
        identity: ModelIdentity,
        shape: ChunkShape,
        codec: RemoteCodec = RemoteCodec.RAW,
        seal_key_name: str | None = None,
    ) -> None:
        self._chunk_bytes = shape.chunk_tokens * TOKEN_BYTES
        self._root = hashlib.sha256()
        for field in _fields(identity, shape, codec, seal_key_name):
            self._root.update(field)

    def fingerprint(self, salt: str = "") -> bytes:
        """`h0` of the tenant named by `salt`."""
        root = self._root.copy()
        root.update(_tagged("salt", salt.encode("utf-8", "surrogatepass")))
        return root.digest()

    def of(self, token_ids: Sequence[int], salt: str = "") -> PromptKeys:
        """The keys of the full chunks of `token_ids`. A rest that is shorter than a chunk has no key.

        Raises `OverflowError` for an id outside `[0, 2**32)`, which no tokenizer produces.
        """
        tokens = _as_little_endian(token_ids)
        fingerprint = self.fingerprint(salt)
        step = self._chunk_bytes
        hashes = []
        previous = fingerprint
        for end in range(step, len(tokens) + 1, step):
            previous = hashlib.sha256(previous + tokens[end - step : end]).digest()
            hashes.append(previous)
        return PromptKeys(fingerprint, tuple(hashes))


def _fields(
    identity: ModelIdentity, shape: ChunkShape, codec: RemoteCodec, seal_key_name: str | None
) -> Iterable[bytes]:
    numbers = {
        "schema": SCHEMA_VERSION,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "chunk_tokens": shape.chunk_tokens,
    }
    texts = {
        "weights": identity.weights_digest,
        "tokenizer": identity.tokenizer_digest,
        "settings": identity.settings,
        "adapter": identity.adapter,
        "dtype": str(shape.dtype),
        # The payload is raw memory, so a machine of the other byte order must not find it.
        "byteorder": sys.byteorder,
    }
    if codec is not RemoteCodec.RAW:
        # Chunks that were computed after an approximate chunk are approximate too. They must have other keys than exact
        # chunks. Keys of exact chunks have no codec field, so they are the same as before there were codecs.
        texts["codec"] = codec.value
    if seal_key_name is not None:
        # Jobs with another secret key, or none, would take these chunks for damaged, and delete them.
        texts["seal"] = seal_key_name
    for tag, number in numbers.items():
        yield _tagged(tag, struct.pack("<Q", number))
    for tag, text in texts.items():
        yield _tagged(tag, text.encode("utf-8", "surrogatepass"))


def _tagged(tag: str, value: bytes) -> bytes:
    # With lengths in front of both, since otherwise ("ab", "c") and ("a", "bc") would be the same key.
    name = tag.encode("ascii")
    return struct.pack("<II", len(name), len(value)) + name + value


def _as_little_endian(token_ids: Sequence[int]) -> bytes:
    tokens = array("I", token_ids)
    if tokens.itemsize != TOKEN_BYTES:  # pragma: no cover - no platform that torch runs on
        raise RuntimeError("a C unsigned int is not four bytes here")
    if sys.byteorder == "big":  # pragma: no cover - as above
        tokens.byteswap()
    return tokens.tobytes()
