"""The engine over int8 chunks from Redis: how far logits move, with the default model and with tiny ones."""

from collections.abc import Callable, Iterator

import pytest
import torch
from engine_helpers import CHUNK, answers, ask, make_engine, plain_answer, tokens_of

from cache.config import CacheConfig, RemoteCodec, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from core.clock import SystemClock
from inference_service.active_sequence import Piece
from inference_service.config import EngineConfig
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model
from tests.cache.cache_support import RedisServer

POSITIONS = 48


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


Opener = Callable[[LoadedModel, int], TwoLevelCache]


@pytest.fixture
def opened(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Opener]:
    """Opens int8 caches in the test's own Redis namespace, and closes them."""
    caches: list[TwoLevelCache] = []
    namespace = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)

    def opener(model: LoadedModel, chunk_tokens: int) -> TwoLevelCache:
        config = CacheConfig(
            chunk_tokens=chunk_tokens,
            sizing=SizingConfig(capacity_chunks=200),
            remote=RemoteConfig(
                redis_url=redis_url,
                redis_namespace=namespace,
                remote_codec=RemoteCodec.INT8,
                remote_deadline_ms=10_000.0,
            ),
        )
        caches.append(open_cache(config, model.chunk_shape(chunk_tokens), model.identity, SystemClock()))
        return caches[-1]

    yield opener
    for cache in caches:
        cache.close(1.0)


@pytest.fixture(scope="module")
def default_model() -> LoadedModel:
    return load_checked_model(EngineConfig(device="cpu", max_model_len=512))


def test_logits_of_the_default_model_stay_close(default_model: LoadedModel, opened: Opener) -> None:
    """Over a prompt of 8 chunks no logit of further tokens moves by more than 0.3 of their standard deviation."""
    chunk_tokens = CacheConfig().chunk_tokens
    prompt, rest = tokens_of(1, 8 * chunk_tokens), tokens_of(2, POSITIONS)
    runner = default_model.make_runner(2, chunk_tokens)
    runner.forward([Piece(0, 0, prompt)])
    writer = opened(default_model, chunk_tokens)
    writer.store(prompt, lambda index, out: runner.pool.read_chunk(0, index, out))
    assert writer.flush(10.0)
    with opened(default_model, chunk_tokens).fetch_and_lookup(prompt) as prefix:
        assert prefix.remote_chunks == 8
        for index, chunk in enumerate(prefix.chunks):
            runner.pool.load_chunk(1, index, chunk)
    agreed = 0
    for index, token in enumerate(rest):
        exact, near = runner.forward([Piece(row, len(prompt) + index, [token]) for row in (0, 1)])
        drift = (near - exact).abs() / exact.std()
        assert drift.mean() < 0.06
        assert drift.max() < 0.3
        assert torch.any(near != exact), "these are not the rounded chunks"
        agreed += int(exact.argmax() == near.argmax())
    assert agreed >= 0.85 * POSITIONS


def test_greedy_answers_agree_nearly_always(model: LoadedModel, opened: Opener) -> None:
    """For each architecture, with sensitive weights: answers over int8 chunks compared with plain ones."""
    prompts = {f"p{seed}": tokens_of(seed, 40) for seed in range(24)}

    def run(cache: TwoLevelCache) -> dict[str, bool]:
        engine = make_engine(model, cache=cache, max_running=4)
        # No costs are learnt yet, so no transfer is skipped for being slower than such a small prefill.
        engine._scheduler.learn_prefill_cost = lambda tokens, took_ms: None  # type: ignore[method-assign]
        done = answers(engine.run([ask(name, tokens) for name, tokens in prompts.items()]))
        assert {one.remote_tokens for one in done.values()} <= {0, 39}
        return {
            name: one.remote_tokens > 0 and one.token_ids == plain_answer(model, prompts[name], 6)
            for name, one in done.items()
        }

    first = opened(model, CHUNK)
    assert not any(run(first).values())
    assert first.flush(10.0)
    assert sum(run(opened(model, CHUNK)).values()) >= 20
