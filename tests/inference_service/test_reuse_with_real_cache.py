"""The engine over the two-level cache and a real Redis: the same answers, whichever tier the chunks come from."""

from collections.abc import Callable, Iterator

import pytest
from engine_helpers import CHUNK, MAX_LEN, answers, ask, make_engine, plain_answer, tokens_of

from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from core.clock import SystemClock
from inference_service.completion import Completion
from inference_service.model import LoadedModel
from tests.cache.cache_support import RedisServer

PROMPTS = {f"p{length}": tokens_of(length, length) for length in (7, 8, 9, 23, 24, 25, 40, 57)}


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


Opener = Callable[..., TwoLevelCache]


@pytest.fixture
def opened(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Opener]:
    """Opens caches in the test's own Redis namespace, and closes them."""
    caches: list[TwoLevelCache] = []
    namespace = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)

    def opener(model: LoadedModel, capacity: int = 200, remote: bool = True) -> TwoLevelCache:
        config = CacheConfig(
            chunk_tokens=CHUNK,
            sizing=SizingConfig(capacity_chunks=capacity),
            remote=RemoteConfig(
                redis_url=redis_url if remote else None, redis_namespace=namespace, remote_deadline_ms=10_000.0
            ),
        )
        caches.append(open_cache(config, model.chunk_shape(CHUNK), model.identity, SystemClock()))
        return caches[-1]

    yield opener
    for cache in caches:
        cache.close(1.0)


def run(model: LoadedModel, cache: TwoLevelCache | None, names: list[str] | None = None) -> dict[str, Completion]:
    """Run requests in a new engine, and check that its answers are the plain ones."""
    engine = make_engine(model, cache=cache, max_running=3)
    # No costs are learnt yet, so no transfer is skipped for being slower than such a small prefill.
    engine._scheduler.learn_prefill_cost = lambda tokens, took_ms: None
    done = answers(engine.run([ask(name, PROMPTS[name]) for name in names or PROMPTS]))
    for name, one in done.items():
        assert one.token_ids == plain_answer(model, PROMPTS[name], 6), name
    return done


def most(name: str) -> int:
    """Number of tokens in the prompt's full chunks, without the prompt's last token."""
    length = len(PROMPTS[name])
    return min(length // CHUNK * CHUNK, length - 1)


def test_cache_off(model: LoadedModel) -> None:
    assert all(one.computed_tokens == one.prompt_tokens for one in run(model, None).values())


def test_all_from_the_local_tier(model: LoadedModel, opened: Opener) -> None:
    cache = opened(model, remote=False)
    assert all(one.local_tokens == one.remote_tokens == 0 for one in run(model, cache).values())
    again = run(model, cache)
    assert {name: one.local_tokens for name, one in again.items()} == {name: most(name) for name in PROMPTS}
    assert all(one.remote_tokens == 0 for one in again.values())
    assert cache.stats().pinned_chunks == 0


def test_all_from_redis(model: LoadedModel, opened: Opener) -> None:
    first = opened(model)
    run(model, first)
    assert first.flush(10.0)
    again = run(model, opened(model))
    assert {name: one.remote_tokens for name, one in again.items()} == {name: most(name) for name in PROMPTS}
    assert all(one.local_tokens == 0 for one in again.values())


def test_some_from_each(model: LoadedModel, opened: Opener) -> None:
    """A second engine has chunks of the shorter prompts; a longer prompt begins like one of them."""
    start = tokens_of(57, 57)[:24]
    PROMPTS["start"] = start
    try:
        first, second = opened(model), opened(model)
        run(model, second, ["start"])
        run(model, first)
        assert first.flush(10.0)
        done = run(model, second, ["p57", "p40"])
    finally:
        del PROMPTS["start"]
    assert (done["p57"].local_tokens, done["p57"].remote_tokens) == (24, 32)
    assert (done["p40"].local_tokens, done["p40"].remote_tokens) == (0, 39)


def test_without_local_room_redis_serves_every_time(qwen2: LoadedModel, opened: Opener) -> None:
    first = opened(qwen2, capacity=0)
    run(qwen2, first)
    assert first.flush(10.0)
    for _ in range(2):
        again = run(qwen2, first)
        assert {name: one.remote_tokens for name, one in again.items()} == {name: most(name) for name in PROMPTS}


@pytest.mark.parametrize("capacity", [1, 3, 7])
def test_a_local_tier_that_evicts_all_the_time(model: LoadedModel, opened: Opener, capacity: int) -> None:
    cache = opened(model, capacity=capacity, remote=False)
    for _ in range(3):
        run(model, cache)
    assert cache.stats().used_chunks <= capacity


def test_models_do_not_share_chunks(tiny_models: dict[str, LoadedModel], opened: Opener) -> None:
    cache = opened(tiny_models["qwen2"])
    run(tiny_models["qwen2"], cache)
    assert cache.flush(10.0)
    assert all(one.remote_tokens == 0 for one in run(tiny_models["llama"], opened(tiny_models["llama"])).values())


def test_the_rows_are_longer_than_every_prompt() -> None:
    assert max(map(len, PROMPTS.values())) + 6 < MAX_LEN
