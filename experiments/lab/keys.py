"""Keys of a trace's blocks, and the tensors that stand for their contents."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from cache.keys import KeySchema, PromptKeys
from cache.protocol import ChunkShape, ModelIdentity

BLOCK_SHAPE = ChunkShape(layers=1, kv_heads=1, chunk_tokens=1, head_dim=1, dtype=torch.uint8)
"""Two bytes per block: the manager moves real tensors, but a trace has no content for them."""


class BlockKeys(KeySchema):
    """Keys of blocks instead of tokens. Like a chunk's hash, a block's id stands for the block and all before it."""

    def __init__(self) -> None:
        super().__init__(ModelIdentity("policy lab", "", ""), BLOCK_SHAPE)
        self._root_key = self.fingerprint()
        # Keeps the keys of the latest lookup for the store that follows.
        self._hashes = lru_cache(maxsize=1)(lambda blocks: tuple(map(block_key, blocks)))

    def of(self, token_ids: Sequence[int], salt: str = "") -> PromptKeys:
        """Return one key per element of `token_ids`, which are ids of blocks."""
        return PromptKeys(self._root_key, self._hashes(tuple(token_ids)))


def block_key(block: int) -> bytes:
    """Hash the id, so that keys are spread evenly, as policies that sample by key expect."""
    return hashlib.sha256(block.to_bytes(8, "little")).digest()
