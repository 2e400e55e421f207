"""Keys of a trace's blocks, and the tensors that stand for their contents."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from cache.keys import KeySchema, PromptKeys
from cache.protocol import ChunkShape, ModelIdentity

BLOCK_SHAPE = ChunkShape(layers=1, kv_heads=1, chunk_tokens=1, head_dim=1, dtype=torch.uint8)
"""Two bytes: the manager moves real tensors, but a trace has no content to put into them."""


class BlockKeys(KeySchema):
    """The keys of blocks instead of tokens: an id stands for its block and all before it, as a chunk's hash does."""

    def __init__(self) -> None:
        super().__init__(ModelIdentity("policy lab", "", ""), BLOCK_SHAPE)
        self._root_key = self.fingerprint()
        # Of the prompt that was just looked up, when it is stored.
        self._hashes = lru_cache(maxsize=1)(lambda blocks: tuple(map(block_key, blocks)))

    def of(self, token_ids: Sequence[int], salt: str = "") -> PromptKeys:
        """One key for each of `token_ids`, which are ids of blocks."""
        return PromptKeys(self._root_key, self._hashes(tuple(token_ids)))


def block_key(block: int) -> bytes:
    """Spread evenly over all keys, as policies that sample or count by keys expect."""
    return hashlib.sha256(block.to_bytes(8, "little")).digest()
