"""Made prompts: token ids that a seed and a name determine, on every machine and version."""

import hashlib
import struct


def made_token_ids(seed: int, name: int | str, tokens: int, vocab_size: int) -> tuple[int, ...]:
    """`tokens` tokens, each in [0, `vocab_size`); fewer tokens of a name are a prefix of more.

    An extendable hash makes them, so that different names are different tokens.
    """
    stream = hashlib.shake_128(f"{seed}/{name}".encode()).digest(8 * tokens)
    return tuple(word % vocab_size for word in struct.unpack(f"<{tokens}Q", stream))
