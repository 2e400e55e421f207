"""Requests enter and leave between steps: answers equal those of the model alone, and none is delayed for long."""

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from core.clock import ManualClock
from core.records import FinishReason
from inference_service import forward, scheduler
from inference_service.active_sequence import Piece
from inference_service.completion import Completion, Failure
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel
from tests.inference_service.engine_helpers import (
    CHUNK,
    MemoryCache,
    answers,
    ask,
    make_engine,
    plain_answer,
    tokens_of,
)


def finish(engine: ContinuousEngine, most_steps: int = 500) -> list[Completion | Failure]:
    done: list[Completion | Failure] = []
    for _ in range(most_steps):
        done += engine.step()
        if not engine.unfinished:
            return done
    raise AssertionError(f"{engine.unfinished} requests are not done after {most_steps} steps")


def steps_until_done(engine: ContinuousEngine, request_id: str) -> int:
    for step in range(1, 500):
        if any(one.request.request_id == request_id for one in engine.step()):
            return step
    raise AssertionError(f"{request_id} is not done")


class Watch:
    """Records each pass: its decoding rows, and the tokens of its prompt pieces. `poison` fails a pass."""

    def __init__(self, engine: ContinuousEngine, poison: Callable[[Sequence[Piece]], bool] | None = None) -> None:
        self.passes: list[tuple[int, list[int]]] = []
        self._forward = engine._runner.forward
        self._poison = poison
        self._engine = engine
        engine._runner.forward = self.forward

    @property
    def prefills(self) -> list[int]:
        return [tokens for _, pieces in self.passes for tokens in pieces]

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        if self._poison is not None and self._poison(pieces):
            raise RuntimeError("CUDA out of memory")
        running = {sequence.row for sequence in self._engine._rows.running}
        prompts = [len(piece.tokens) for piece in pieces if piece.row not in running]
        self.passes.append((len(pieces) - len(prompts), prompts))
        return self._forward(pieces)


def test_a_step_computes_no_more_prompt_tokens_than_its_budget(model: LoadedModel) -> None:
    engine = make_engine(model, step_prefill_tokens=10)
    for number in range(6):
        engine.submit(ask(f"r{number}", tokens_of(number, 5 + 7 * number), 3), 0.0)
    watch = Watch(engine)
    while engine.unfinished:
        watch.passes.clear()
        engine.step()
        assert sum(watch.prefills) <= 10


def test_running_sequences_decode_in_every_step_of_a_long_prompt(model: LoadedModel) -> None:
    engine = make_engine(model, step_prefill_tokens=4, step_prefill_ms=0)
    engine.submit(ask("running", tokens_of(1, 4), 30), 0.0)
    engine.step()
    watch = Watch(engine)
    engine.submit(ask("long", tokens_of(2, 40), 2), 0.0)
    for _ in range(9):
        engine.step()
    # The long prompt's time is unlimited here, so its pieces share the passes of running sequences.
    assert watch.passes == [(1, [4])] * 9


def test_a_short_prompt_overtakes_a_long_one_which_still_gets_half(model: LoadedModel) -> None:
    engine = make_engine(model, step_prefill_tokens=8)
    engine.submit(ask("long", tokens_of(1, 48), 1), 0.0)
    engine.step()
    engine.submit(ask("short", tokens_of(2, 4), 1), 0.0)
    assert [one.request.request_id for one in engine.step()] == ["short"]
    for number in range(20):
        engine.submit(ask(f"more{number}", tokens_of(3 + number, 8), 1), 0.0)
    # 36 of its tokens are left, and many other prompts leave it only 4 per step.
    assert steps_until_done(engine, "long") == 9


class Timed(Watch):
    """On the engine's clock each prompt token takes 1 ms, and all decoding rows together take 10 ms."""

    def __init__(self, engine: ContinuousEngine, clock: ManualClock) -> None:
        super().__init__(engine)
        self._clock = clock

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        logits = super().forward(pieces)
        rows, prompts = self.passes[-1]
        self._clock.advance(10.0 * bool(rows) + sum(prompts))
        return logits


def test_a_long_prompt_takes_its_share_of_the_time_in_pieces_of_the_time_allowed(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, clock=clock, step_prefill_tokens=10, step_prefill_ms=9)
    engine.submit(ask("running", tokens_of(1, 4), 50), 0.0)
    engine.step()
    watch = Timed(engine, clock)
    engine.submit(ask("long", tokens_of(2, 60), 1), 0.0)
    steps_until_done(engine, "long")
    # The first piece is of unknown cost. A quarter of the time: three decode steps of 10 ms after each.
    decode, sizes = (1, []), (10, *[9] * 5, 5)
    expected = [one for size in sizes for one in (decode, (0, [size]), decode, decode)]
    assert watch.passes == expected[:-2]


def test_long_prompts_alone_take_pieces_of_the_budget_however_little_the_time_allows(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, clock=clock, step_prefill_tokens=20, step_prefill_ms=4)
    watch = Timed(engine, clock)
    engine.submit(ask("one", tokens_of(2, 60), 1), 0.0)
    engine.submit(ask("other", tokens_of(3, 60), 1), 0.0)
    finish(engine)
    assert watch.passes == [(0, [20])] * 6


def test_what_comes_while_a_long_prompt_is_alone_waits_for_one_piece(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, clock=clock, step_prefill_tokens=20, step_prefill_ms=4)
    watch = Timed(engine, clock)
    engine.submit(ask("long", tokens_of(2, 60), 1), 0.0)
    engine.step()
    assert watch.passes == [(0, [20])]
    engine.submit(ask("short", tokens_of(3, 4), 1), 0.0)
    assert [one.request.request_id for one in engine.step()] == ["short"]
    # If nothing decodes, a piece has twice the time, and at least one chunk.
    assert watch.passes[1:] == [(0, [4]), (0, [8])]
    steps_until_done(engine, "long")
    assert watch.passes[3:] == [(0, [20]), (0, [12])]


def test_a_long_prompt_alone_takes_longer_pieces_where_the_time_allows_them(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, clock=clock, step_prefill_tokens=10, step_prefill_ms=9)
    watch = Timed(engine, clock)
    engine.submit(ask("first", tokens_of(1, 20), 1), 0.0)
    finish(engine)
    engine.submit(ask("long", tokens_of(2, 60), 1), 0.0)
    finish(engine)
    # The first piece is of unknown cost.
    assert watch.passes == [(0, [10]), (0, [10]), *[(0, [18])] * 3, (0, [6])]


def test_without_a_time_limit_the_budget_of_tokens_alone_counts(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, clock=clock, step_prefill_tokens=20, step_prefill_ms=0)
    engine.submit(ask("running", tokens_of(1, 4), 30), 0.0)
    engine.step()
    watch = Timed(engine, clock)
    engine.submit(ask("long", tokens_of(2, 60), 1), 0.0)
    assert steps_until_done(engine, "long") == 3
    assert watch.passes == [(1, [20])] * 3


def test_several_long_prompts_all_end(model: LoadedModel) -> None:
    engine = make_engine(model, max_running=3, step_prefill_tokens=6)
    requests = [ask(f"r{number}", tokens_of(number, 40 + number), 4) for number in range(7)]
    for request in requests:
        engine.submit(request, 0.0)
    found = answers(finish(engine))
    for request in requests:
        assert found[request.request_id].token_ids == plain_answer(model, request.prompt_token_ids, 4)


def test_tokens_of_what_runs_stay_within_their_bound(model: LoadedModel) -> None:
    engine = make_engine(model, max_running=4, max_running_tokens=40)
    for number in range(5):
        engine.submit(ask(f"r{number}", tokens_of(number, 10), 6), 0.0)
    most = 0
    while engine.unfinished:
        engine.step()
        most = max(most, len(engine._rows.running) + len(engine._rows.prefilling))
    assert most == 2


def test_a_request_above_the_bound_runs_alone(model: LoadedModel) -> None:
    engine = make_engine(model, max_running_tokens=8)
    requests = [ask(f"r{number}", tokens_of(number, 12), 3) for number in range(2)]
    for request in requests:
        engine.submit(request, 0.0)
    found = answers(finish(engine))
    assert [one.decode_rows for one in found.values()] == [1.0, 1.0]


def test_a_deadline_passes_while_all_rows_are_taken(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, max_running=1, clock=clock)
    engine.submit(ask("running", tokens_of(1, 4), 30), 0.0)
    engine.submit(ask("late", tokens_of(2, 4), 4, deadline_ms=50.0), 0.0)
    assert engine.step() == []
    clock.advance(50)
    (late,) = engine.step()
    assert isinstance(late, Completion)
    assert (late.request.request_id, late.finish_reason, late.token_ids) == ("late", FinishReason.DEADLINE, ())
    assert (late.prompt_tokens, late.computed_tokens) == (4, 4)
    assert engine.unfinished == 1


def test_a_deadline_passes_in_the_midst_of_a_prompt(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, max_running=2, clock=clock, step_prefill_tokens=4)
    engine.submit(ask("late", tokens_of(2, 40), 4, deadline_ms=50.0), 0.0)
    engine.step()
    clock.advance(60)
    (late,) = engine.step()
    assert isinstance(late, Completion)
    assert late.finish_reason is FinishReason.DEADLINE
    # Its row is free again.
    engine.submit(ask("next", tokens_of(3, 9), 5), 0.0)
    assert answers(finish(engine))["next"].token_ids == plain_answer(model, tokens_of(3, 9), 5)


def test_a_deadline_passes_while_it_runs_and_what_it_has_is_its_answer(model: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(model, clock=clock)
    engine.submit(ask("late", tokens_of(2, 5), 30, deadline_ms=50.0), 0.0)
    engine.step()
    clock.advance(60)
    (late,) = engine.step()
    assert isinstance(late, Completion)
    assert late.finish_reason is FinishReason.DEADLINE
    assert late.token_ids == plain_answer(model, tokens_of(2, 5), 30)[: len(late.token_ids)]
    assert 0 < len(late.token_ids) < 30


TIMEOUT = {"request_timeout_ms": 50.0}


def timed_out(engine: ContinuousEngine, clock: ManualClock) -> tuple[str, str]:
    """The only request that leaves at its deadline, and its reason."""
    clock.advance(49)
    assert engine.step() == []
    clock.advance(1)
    (late,) = engine.step()
    assert isinstance(late, Failure)
    return late.request.request_id, late.reason


def test_a_request_times_out_in_the_queue(model: LoadedModel) -> None:
    clock = ManualClock(1000.0)
    engine = make_engine(model, max_running=1, clock=clock, **TIMEOUT)
    engine.submit(ask("running", tokens_of(1, 4), 30), 1001.0)
    engine.step()
    engine.submit(ask("late", tokens_of(2, 4), 4), 1000.0)
    assert timed_out(engine, clock) == (
        "late",
        "timeout: not answered within 50 ms; see --request-timeout-ms (in the queue)",
    )
    assert engine.unfinished == 1


def test_a_request_times_out_in_the_midst_of_its_prompt(model: LoadedModel) -> None:
    clock = ManualClock(1000.0)
    engine = make_engine(model, max_running=2, clock=clock, step_prefill_tokens=4, **TIMEOUT)
    engine.submit(ask("late", tokens_of(2, 60), 4), 1000.0)
    engine.step()
    name, reason = timed_out(engine, clock)
    assert (name, reason.partition(" (")[2]) == ("late", "with 0 tokens of its answer)")
    # Its row is free again.
    engine.submit(ask("next", tokens_of(3, 9), 5), clock.wall_ms())
    assert answers(finish(engine))["next"].token_ids == plain_answer(model, tokens_of(3, 9), 5)


def test_a_request_times_out_while_it_runs_and_others_go_on(model: LoadedModel) -> None:
    clock = ManualClock(1000.0)
    engine = make_engine(model, clock=clock, **TIMEOUT)
    engine.submit(ask("late", tokens_of(2, 5), 40), 1000.0)
    engine.submit(ask("running", tokens_of(3, 9), 12), 1030.0)
    engine.step()
    name, reason = timed_out(engine, clock)
    assert (name, reason.partition(" (")[2]) == ("late", "with 3 tokens of its answer)")
    assert answers(finish(engine))["running"].token_ids == plain_answer(model, tokens_of(3, 9), 12)


def test_a_deadline_of_its_own_comes_before_the_time_out(model: LoadedModel) -> None:
    clock = ManualClock(1000.0)
    engine = make_engine(model, max_running=1, clock=clock, **TIMEOUT)
    for name in ("running", "waiting"):
        engine.submit(ask(name, tokens_of(2, 5), 40, created_at_ms=1000.0, deadline_ms=50.0), 1000.0)
    engine.step()
    clock.advance(60)
    done = answers(engine.step())
    assert {one.finish_reason for one in done.values()} == {FinishReason.DEADLINE}
    assert [len(done[name].token_ids) > 0 for name in ("running", "waiting")] == [True, False]


def test_without_a_time_out_a_request_may_take_for_ever(model: LoadedModel) -> None:
    clock = ManualClock(1000.0)
    engine = make_engine(model, clock=clock, request_timeout_ms=0)
    engine.submit(ask("a", tokens_of(2, 5), 3), 1000.0)
    clock.advance(1e12)
    assert answers(finish(engine)).keys() == {"a"}


def test_the_engine_says_whom_it_begins_with_before_it_does_anything_for_them(model: LoadedModel) -> None:
    said: list[str] = []
    cache = MemoryCache(model.chunk_shape(CHUNK))
    lookup = cache.lookup

    def told(*arguments: object) -> object:
        said.append("lookup")
        return lookup(*arguments)  # type: ignore[arg-type]

    cache.lookup = told  # type: ignore[method-assign,assignment]
    engine = make_engine(
        model,
        cache=cache,
        max_running=1,
        on_begin=lambda requests: said.extend(one.request_id for one in requests),
        on_pass=lambda: said.append("pass"),
    )
    engine.warm_up()
    assert said == []
    for name in ("a", "b"):
        engine.submit(ask(name, tokens_of(ord(name), 5), 2), 0.0)
    finish(engine)
    assert said == ["a", "lookup", "pass", "pass", "b", "lookup", "pass", "pass"]


def test_the_engine_counts_what_fails_and_tells_what_it_holds(model: LoadedModel) -> None:
    held = []
    cache = MemoryCache(model.chunk_shape(CHUNK))
    engine = make_engine(
        model, cache=cache, max_running=2, step_prefill_tokens=8, on_pass=lambda: held.append(engine.stats)
    )
    cache.store = None  # type: ignore[method-assign,assignment]
    Watch(engine, lambda pieces: len(pieces) > 1)
    engine.submit(ask("a", tokens_of(1, 5), 9), 0.0)
    engine.step()
    engine.submit(ask("long", tokens_of(2, 20), 1), 0.0)
    engine.submit(ask("waits", tokens_of(3, 4), 1), 0.0)
    engine.step()
    last = held[-1]
    assert (last.waiting, last.prefilling, last.running) == (1, 1, 1)
    finish(engine)
    assert engine.stats.failed_passes > 0
    # Chunks of each prompt, and the chunk that the answer fills.
    assert engine.stats.failed_stores == 4
    assert engine.stats.passes == len(held) == held[-1].passes


def test_a_higher_priority_begins_first_and_equals_in_order(model: LoadedModel) -> None:
    engine = make_engine(model, max_running=1)
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)):
        engine.submit(ask(name, tokens_of(ord(name), 6), 2, priority=priority), 0.0)
    assert [one.request.request_id for one in finish(engine)] == ["b", "d", "a", "c", "e"]


def test_a_poison_request_in_a_running_batch_fails_alone(model: LoadedModel) -> None:
    """Each step with the sequence of 13 tokens fails; the other requests are not affected."""
    engine = make_engine(model)
    requests = [ask(f"r{number}", tokens_of(number, 6 + number), 6) for number in range(3)]
    bad = ask("bad", tokens_of(9, 11), 6)
    for request in (requests[0], bad, *requests[1:]):
        engine.submit(request, 0.0)
    poisoned = 13

    def holds_poison(pieces: Sequence[Piece]) -> bool:
        owners = {sequence.row: sequence.request.request_id for sequence in engine._rows.running}
        return any(piece.start >= poisoned and owners.get(piece.row) == "bad" for piece in pieces)

    Watch(engine, holds_poison)
    done = finish(engine)
    (failure,) = [one for one in done if isinstance(one, Failure)]
    assert failure.request.request_id == "bad"
    assert failure.reason == "decode failed: RuntimeError: CUDA out of memory"
    found = answers(one for one in done if not isinstance(one, Failure))
    for request in requests:
        assert found[request.request_id].token_ids == plain_answer(model, request.prompt_token_ids, 6)


def test_memory_that_one_request_has_too_little_of_is_freed_for_the_others(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass with the poisoned request allocates memory and fails; the memory is freed before each is tried alone."""
    engine = make_engine(model)
    requests = [ask(f"r{number}", tokens_of(number, 6 + number), 6) for number in range(3)]
    for request in (requests[0], ask("bad", tokens_of(9, 11), 6), *requests[1:]):
        engine.submit(request, 0.0)
    held: list[weakref.ref[torch.Tensor]] = []
    emptied: list[int] = []
    alive: list[bool] = []

    def exhausts(pieces: Sequence[Piece]) -> bool:
        alive.extend(tensor() is not None for tensor in held)
        owners = {sequence.row: sequence.request.request_id for sequence in engine._rows.running}
        if any(piece.start >= 13 and owners.get(piece.row) == "bad" for piece in pieces):
            activations = torch.zeros(10)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return False

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(held)))
    # pytest's log keeps tracebacks, and with them the tensors of a pass.
    monkeypatch.setattr(forward.logger, "disabled", True)
    Watch(engine, exhausts)
    done = finish(engine)
    (failure,) = [one for one in done if isinstance(one, Failure)]
    assert failure.request.request_id == "bad"
    assert failure.reason == "decode failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    found = answers(one for one in done if not isinstance(one, Failure))
    for request in requests:
        assert found[request.request_id].token_ids == plain_answer(model, request.prompt_token_ids, 6)
    # The failed pass with all of them, and the one with it alone.
    assert emptied == [1, 2]
    assert alive
    assert not any(alive)


@pytest.mark.parametrize("at", ["a pass", "the cache"])
def test_a_device_that_has_failed_is_nobodys_failure(model: LoadedModel, at: str) -> None:
    """Nothing runs in the process after this error, so another process has to continue."""

    def fails(*_: object) -> bool:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    cache = MemoryCache(model.chunk_shape(CHUNK))
    engine = make_engine(model, cache=cache)
    for number in range(2):
        engine.submit(ask(f"r{number}", tokens_of(number, 6), 6), 0.0)
    if at == "a pass":
        Watch(engine, fails)
    else:
        cache.lookup = fails  # type: ignore[method-assign,assignment]
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_step_that_fails_once_costs_no_request(model: LoadedModel) -> None:
    engine = make_engine(model)
    for number in range(3):
        engine.submit(ask(f"r{number}", tokens_of(number, 6 + number), 6), 0.0)
    failed: list[int] = []

    def once(pieces: Sequence[Piece]) -> bool:
        if len(pieces) == 3 and not failed:
            failed.append(1)
            return True
        return False

    Watch(engine, once)
    found = answers(finish(engine))
    assert failed
    for number in range(3):
        assert found[f"r{number}"].token_ids == plain_answer(model, tokens_of(number, 6 + number), 6)


def test_without_a_budget_a_pass_is_bounded_all_the_same(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MOST_PASS_TOKENS", 30)
    engine = make_engine(model, max_running=8, step_prefill_tokens=0)
    engine.submit(ask("running", tokens_of(9, 4), 9), 0.0)
    engine.step()
    lengths = (10, 20, 5, 40, 8)
    for number, length in enumerate(lengths):
        engine.submit(ask(f"r{number}", tokens_of(number, length), 4), 0.0)
    watch = Watch(engine)
    done = engine.step()
    assert watch.passes == [(1, [10, 20]), (0, [5]), (0, [40]), (0, [8])]
    found = answers([*done, *finish(engine)])
    for number, length in enumerate(lengths):
        assert found[f"r{number}"].token_ids == plain_answer(model, tokens_of(number, length), 4)


def test_a_prompt_waits_a_step_for_a_chunk_that_another_computes(model: LoadedModel) -> None:
    """The common prefix of two prompts is computed once; unrelated prompts and those of other tenants do not wait."""
    cache = MemoryCache(model.chunk_shape(CHUNK))
    engine = make_engine(model, cache=cache, max_running=8)
    shared = tokens_of(1, 2 * CHUNK)
    prompts = {"first": shared + tokens_of(2, 3), "second": shared + tokens_of(3, 5), "other": tokens_of(4, 20)}
    engine.submit(ask("tenant", shared + tokens_of(2, 3), 4, cache_salt="another"), 0.0)
    for name in ("first", "other", "second"):
        engine.submit(ask(name, prompts[name], 4), 0.0)
    watch = Watch(engine)
    engine.step()
    engine.step()
    assert watch.passes == [(0, [19, 19, 20]), (3, [5])]
    found = answers(finish(engine))
    assert {name: found[name].local_tokens for name in prompts} == {"first": 0, "second": 2 * CHUNK, "other": 0}
    for name, prompt in prompts.items():
        assert found[name].token_ids == plain_answer(model, prompt, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_the_rows_that_a_request_decoded_with_are_counted(model: LoadedModel, count: int) -> None:
    engine = make_engine(model)
    for number in range(count):
        engine.submit(ask(f"r{number}", tokens_of(number, 6), 5), 0.0)
    found = answers(finish(engine))
    assert [one.decode_rows for one in found.values()] == [float(count)] * count
    assert sorted(one.began_with for one in found.values()) == list(range(1, count + 1))
