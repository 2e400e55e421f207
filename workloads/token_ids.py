"""Generated prompts: a seed and a name determine the token ids, on every machine and version."""

import hashlib
import struct


def made_token_ids(seed: int, name: int | str, tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Return `tokens` token ids in [0, `vocab_size`). For one name, a shorter result is a prefix of a longer one.

    They come from an extendable hash, so different names give different tokens.
    """
    stream = hashlib.shake_128(f"{seed}/{name}".encode()).digest(8 * tokens)
    return tuple(word % vocab_size for word in struct.unpack(f"<{tokens}Q", stream))
