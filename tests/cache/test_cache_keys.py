"""Keys: what determines them, and which chunks have one."""

from dataclasses import replace

import pytest
import torch
from cache_support import IDENTITY, SHAPE, C, given, in_another_process
from hypothesis import strategies as st

from cache.config import RemoteCodec
from cache.keys import KeySchema

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=5 * C)
SCHEMA = KeySchema(IDENTITY, SHAPE)

OTHERS = [
    *(
        KeySchema(replace(IDENTITY, **{name: "other"}), SHAPE)
        for name in ("weights_digest", "tokenizer_digest", "settings", "adapter")
    ),
    *(KeySchema(IDENTITY, replace(SHAPE, **{name: 8})) for name in ("layers", "kv_heads", "head_dim")),
    KeySchema(IDENTITY, replace(SHAPE, dtype=torch.bfloat16)),
    KeySchema(IDENTITY, replace(SHAPE, chunk_tokens=2)),
    KeySchema(IDENTITY, SHAPE, RemoteCodec.INT8),
]


@pytest.mark.parametrize("other", OTHERS)
@given(tokens=tokens)
def test_another_model_or_layout_shares_no_key(other, tokens):
    assert set(SCHEMA.of(tokens).hashes).isdisjoint(other.of(tokens).hashes)
    assert SCHEMA.fingerprint() != other.fingerprint()


def test_all_fingerprints_differ():
    assert len({schema.fingerprint(salt) for schema in [SCHEMA, *OTHERS] for salt in ("", "a")}) == 2 * (
        len(OTHERS) + 1
    )


@given(tokens, st.text(max_size=8), st.text(max_size=8))
def test_a_salt_separates(tokens, a, b):
    shared = set(SCHEMA.of(tokens, a).hashes) & set(SCHEMA.of(tokens, b).hashes)
    assert bool(shared) == (a == b and len(tokens) >= C)


def test_fields_do_not_run_into_each_other():
    one = KeySchema(replace(IDENTITY, settings="ab", adapter="c"), SHAPE)
    other = KeySchema(replace(IDENTITY, settings="a", adapter="bc"), SHAPE)
    assert one.fingerprint() != other.fingerprint()


@given(tokens, tokens)
def test_keys_are_shared_exactly_as_far_as_tokens_are(a, b):
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    equal = [x == y for x, y in zip(SCHEMA.of(a).hashes, SCHEMA.of(b).hashes, strict=False)]
    assert equal == [(i + 1) * C <= common for i in range(len(equal))]


@pytest.mark.parametrize("length", [0, 1, C - 1, C, C + 1, 3 * C - 1, 3 * C, 3 * C + 1])
def test_only_full_chunks_have_keys(length):
    assert len(SCHEMA.of(range(length)).hashes) == length // C


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_an_id_that_is_no_u32_is_refused(bad):
    with pytest.raises(OverflowError):
        SCHEMA.of([bad] * C)


def test_keys_are_the_same_in_every_process():
    script = (
        "from cache_support import IDENTITY, SHAPE; from cache.keys import KeySchema\n"
        "keys = KeySchema(IDENTITY, SHAPE).of(range(8), 's')\n"
        "print(keys.fingerprint.hex(), *(h.hex() for h in keys.hashes))"
    )
    keys = SCHEMA.of(range(8), "s")
    assert in_another_process(script) == " ".join(h.hex() for h in (keys.fingerprint, *keys.hashes))
