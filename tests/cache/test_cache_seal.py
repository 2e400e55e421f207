"""Authenticated chunks on a real Redis: forged chunks are misses, and jobs with different keys share nothing."""

import hashlib
import hmac
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from cache_support import IDENTITY, SHAPE, given, hits, prompt, stamp, store
from hypothesis import strategies as st
from pydantic import SecretStr

from cache.codec import HEADER_BYTES, decode, encode
from cache.config import RemoteCodec
from cache.keys import KeySchema
from cache.payload import RecordError
from cache.seal import CHECKSUM, SEAL_BYTES, Authentication, make_seal

N = 5
TOKENS = prompt(N)
KEY, OTHER_KEY = "the key of the jobs that are ours 1", "the key of the jobs that are ours 2"
SEAL, OTHER_SEAL = Authentication(SecretStr(KEY)), Authentication(SecretStr(OTHER_KEY))


def prompt_keys(seal=SEAL, salt: str = "", codec=RemoteCodec.RAW):
    return KeySchema(IDENTITY, SHAPE, codec, seal.key_name).of(TOKENS, salt)


def names(seal=SEAL, salt: str = "") -> list[str]:
    return [f"infertuner:{chunk_hash.hex()}" for chunk_hash in prompt_keys(seal, salt).hashes]


NAMES = names()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "chunk.key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def authenticated(redis_server, client, caches, key_file):
    """Makes caches with the key on an empty Redis."""
    return lambda **settings: caches(redis_server.url, chunk_key_file=key_file, **settings)


@pytest.fixture
def filled(authenticated):
    """Redis has all chunks of TOKENS, written by another cache."""
    writer = authenticated()
    store(writer, TOKENS)
    assert writer.flush(10)


class TestSeal:
    @given(st.binary(max_size=200), st.binary(max_size=200))
    def test_is_the_hmac_that_others_compute(self, fields: bytes, payload: bytes) -> None:
        whole = hmac.new(KEY.encode(), fields + payload, hashlib.sha256).digest()
        assert SEAL.of(fields, memoryview(payload)) == whole[:SEAL_BYTES]

    def test_of_two_keys_differ(self) -> None:
        assert SEAL.of(b"a", b"b") != OTHER_SEAL.of(b"a", b"b")
        assert SEAL.key_name != OTHER_SEAL.key_name

    def test_a_keys_name_tells_nothing_of_it(self) -> None:
        plain = {hashlib.new(kind, KEY.encode()).hexdigest() for kind in ("sha256", "sha512", "sha1", "md5")}
        assert SEAL.key_name not in plain
        assert KEY not in SEAL.key_name
        assert KEY not in repr(vars(SEAL))

    def test_without_a_key_it_is_a_checksum(self) -> None:
        assert make_seal(None) is CHECKSUM
        assert make_seal(SecretStr(KEY)).of(b"a", b"b") == SEAL.of(b"a", b"b")


class TestKeys:
    def test_keys_of_three_kinds_of_jobs_are_apart(self) -> None:
        kinds = [prompt_keys(seal) for seal in (CHECKSUM, SEAL, OTHER_SEAL)]
        assert len({key for keys in kinds for key in keys.hashes}) == 3 * N
        assert len({keys.fingerprint for keys in kinds}) == 3

    def test_without_a_key_they_are_what_they_were(self) -> None:
        assert prompt_keys(CHECKSUM) == KeySchema(IDENTITY, SHAPE).of(TOKENS)

    def test_the_key_is_in_no_key(self) -> None:
        """A plain digest of the key's bytes is not in a name either."""
        named_by_digest = KeySchema(IDENTITY, SHAPE, RemoteCodec.RAW, hashlib.sha256(KEY.encode()).hexdigest())
        assert named_by_digest.of(TOKENS) != prompt_keys()

    @pytest.mark.parametrize("codec", RemoteCodec)
    def test_codec_and_seal_are_apart(self, codec: RemoteCodec) -> None:
        assert prompt_keys(codec=codec).fingerprint != KeySchema(IDENTITY, SHAPE, codec).fingerprint()


class TestOnRedis:
    @pytest.mark.parametrize("codec", RemoteCodec)
    def test_another_cache_with_the_key_finds_all(self, authenticated, codec: RemoteCodec) -> None:
        writer = authenticated(remote_codec=codec)
        writer.store(TOKENS, lambda index, out: out.fill_(index + 1))
        assert writer.flush(10)
        with authenticated(remote_codec=codec).fetch_and_lookup(TOKENS) as prefix:
            assert prefix.remote_chunks == N
            assert [round(chunk.mean().item(), 2) for chunk in prefix.chunks] == [1, 2, 3, 4, 5]

    def test_jobs_without_it_or_with_another_neither_find_nor_delete(
        self, filled, authenticated, caches, client, monkeypatch
    ) -> None:
        before = set(client.scan_iter())
        url = f"redis://127.0.0.1:{client.get_connection_kwargs()['port']}/0"
        others = [caches(url)]
        monkeypatch.setenv("INFERTUNER_CHUNK_KEY", OTHER_KEY)
        others.append(caches(url))
        for cache in others:
            assert hits(cache, TOKENS) == (0, 0)
            store(cache, TOKENS)
            assert cache.flush(10)
            assert cache.stats().remote_corrupt == 0
        assert before < set(client.scan_iter())
        assert client.dbsize() == 3 * N
        cache = authenticated()
        assert hits(cache, TOKENS) == (0, N)
        assert cache.stats().remote_corrupt == 0

    def test_the_environment_has_the_key_too(self, redis_server, filled, caches, monkeypatch) -> None:
        monkeypatch.setenv("INFERTUNER_CHUNK_KEY", KEY)
        assert hits(caches(redis_server.url), TOKENS) == (0, N)

    def test_neither_redis_nor_a_log_has_the_key(self, filled, authenticated, client, caplog) -> None:
        with caplog.at_level(logging.DEBUG):
            client.setrange(NAMES[1], HEADER_BYTES, b"\xff")
            assert hits(authenticated(), TOKENS) == (0, 1)
        assert "it was not made with our key" in caplog.text
        held = [*client.scan_iter(), *filter(None, client.mget(NAMES))]
        for text in (KEY, hashlib.sha256(KEY.encode()).hexdigest()):
            assert not any(text.encode() in value for value in held)
            assert text not in caplog.text
        assert not any(hashlib.sha256(KEY.encode()).digest() in value for value in held)


class TestForgery:
    """An attacker can write to Redis and knows this program, but not the key."""

    def refused(self, cache, client, found: int) -> None:
        assert hits(cache, TOKENS) == (0, found)
        assert cache.stats().remote_corrupt == 1
        assert cache.flush(10)
        assert not client.exists(NAMES[found])

    def test_a_record_with_a_right_checksum(self, filled, authenticated, client) -> None:
        keys = prompt_keys()
        forged = encode(stamp(prompt(N, first=9), 2), SHAPE, keys.fingerprint, keys.hashes[2])
        assert decode(bytearray(forged), SHAPE, keys.fingerprint, keys.hashes[2]) is not None, (
            "it would pass without a key"
        )
        client.set(NAMES[2], forged)
        self.refused(authenticated(), client, 2)

    def test_a_record_of_another_key(self, filled, authenticated, client) -> None:
        keys = prompt_keys()
        client.set(NAMES[2], encode(stamp(TOKENS, 2), SHAPE, keys.fingerprint, keys.hashes[2], seal=OTHER_SEAL))
        self.refused(authenticated(), client, 2)

    @pytest.mark.parametrize("from_salt", ["", "another tenant"])
    def test_a_right_record_of_another_place_or_tenant(
        self, redis_server, filled, authenticated, client, from_salt: str
    ) -> None:
        store(writer := authenticated(), TOKENS, "another tenant")
        assert writer.flush(10)
        client.copy(names(salt=from_salt)[3], NAMES[2], replace=True)
        self.refused(authenticated(), client, 2)

    @pytest.mark.parametrize("position", [0, 60, 90, 108, 111, *range(112, HEADER_BYTES), HEADER_BYTES, -1])
    def test_a_flipped_bit(self, filled, authenticated, client, position: int) -> None:
        record = bytearray(client.get(NAMES[2]))
        record[position] ^= 1
        client.set(NAMES[2], bytes(record))
        self.refused(authenticated(), client, 2)

    def test_a_seal_of_nothing(self, filled, authenticated, client) -> None:
        client.setrange(NAMES[2], 112, b"\x00" * SEAL_BYTES)
        self.refused(authenticated(), client, 2)

    def test_what_was_forged_is_written_afresh_by_who_computes_it(self, filled, authenticated, client) -> None:
        client.setrange(NAMES[2], 112, b"\x00" * SEAL_BYTES)
        cache = authenticated()
        assert hits(cache, TOKENS) == (0, 2)
        store(cache, TOKENS)
        assert cache.flush(10)
        assert hits(authenticated(), TOKENS) == (0, N)


def test_a_checksum_does_not_pass_for_a_seal() -> None:
    keys = prompt_keys()
    record = bytearray(encode(stamp(TOKENS, 0), SHAPE, keys.fingerprint, keys.hashes[0]))
    with pytest.raises(RecordError, match="not made with our key"):
        decode(record, SHAPE, keys.fingerprint, keys.hashes[0], seal=SEAL)
    with pytest.raises(RecordError, match="checksum does not match"):
        decode(
            encode(stamp(TOKENS, 0), SHAPE, keys.fingerprint, keys.hashes[0], seal=SEAL),
            SHAPE,
            keys.fingerprint,
            keys.hashes[0],
        )


def test_other_models_share_no_key_under_one_seal() -> None:
    other = KeySchema(replace(IDENTITY, adapter="lora"), SHAPE, RemoteCodec.RAW, SEAL.key_name)
    assert set(other.of(TOKENS).hashes).isdisjoint(prompt_keys().hashes)
