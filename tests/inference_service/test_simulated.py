"""The simulated device under the normal engine: its answers, its times, and its refusals."""

from pathlib import Path

import pytest
import torch
from engine_helpers import CHUNK, answers, ask, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_profile import PROFILE, ROUND_NUMBERS

from core.clock import ManualClock
from core.errors import UserError
from core.records import FinishReason
from inference_service.active_sequence import Piece
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.device_profile import DeviceProfile
from inference_service.simulated import MOST_LATE_MS, SimulatedModel, Timeline, load_simulated

MAX_LEN = 64


class LateClock(ManualClock):
    """A clock whose waits last `late_ms` too long."""

    late_ms = 0.0

    def sleep(self, duration_ms: float) -> None:
        self.advance(duration_ms + self.late_ms)


def simulated(clock: ManualClock, profile: DeviceProfile = PROFILE) -> SimulatedModel:
    return SimulatedModel(profile, 0, MAX_LEN, clock, clock.advance)


def engine_over(model: SimulatedModel, clock: ManualClock, *, max_running: int = 4) -> ContinuousEngine:
    config = EngineConfig(max_running=max_running, max_model_len=MAX_LEN, step_prefill_tokens=0)
    return ContinuousEngine(model, config, None, CHUNK, clock)


def test_the_engine_takes_the_time_of_the_profile() -> None:
    clock = ManualClock()
    engine = engine_over(simulated(clock), clock)
    done = answers(engine.run([ask("a", tokens_of(1, 20), 3), ask("b", tokens_of(2, 30), 3)]))
    prefills = PROFILE.pass_ms((), [(20, 0), (30, 0)])
    steps = PROFILE.decode_ms([20, 30]) + PROFILE.decode_ms([21, 31])
    assert clock.monotonic_ms() == pytest.approx(prefills + steps)
    assert done["a"].first_token_ms == done["b"].first_token_ms == pytest.approx(prefills)
    assert done["b"].finished_ms == pytest.approx(prefills + steps)


def test_a_prompt_that_comes_meanwhile_shares_the_pass_of_what_runs() -> None:
    clock = ManualClock()
    engine = engine_over(simulated(clock), clock)
    engine.submit(ask("a", tokens_of(1, 20), 30), 0.0)
    engine.step()
    before_ms = clock.monotonic_ms()
    engine.submit(ask("b", tokens_of(2, 30), 30), 0.0)
    engine.step()
    assert clock.monotonic_ms() - before_ms == pytest.approx(PROFILE.pass_ms([20], [(30, 0)]))


def test_a_token_s_time_is_that_of_its_pass_and_not_of_its_step() -> None:
    """The step continues with a separate pass for a piece of a long prompt before the answer leaves."""
    clock = ManualClock()
    config = EngineConfig(max_running=2, max_model_len=MAX_LEN, step_prefill_tokens=16)
    engine = ContinuousEngine(simulated(clock), config, None, CHUNK, clock)
    engine.submit(ask("a", tokens_of(1, 10), 2), 0.0)
    engine.step()
    engine.submit(ask("long", tokens_of(2, 50), 2), 0.0)
    (one,) = answers(engine.step()).values()
    first_ms = PROFILE.prefill_ms(10, 0)
    last_ms = first_ms + PROFILE.decode_ms([10])
    assert (one.first_token_ms, one.last_token_ms) == (pytest.approx(first_ms), pytest.approx(last_ms))
    assert one.finished_ms == clock.monotonic_ms() > last_ms


def test_a_deadline_passes_in_the_device_s_time() -> None:
    clock = ManualClock()
    engine = engine_over(simulated(clock), clock)
    prompt = tokens_of(1, 20)
    deadline_ms = PROFILE.prefill_ms(20, 0) + 1.5 * PROFILE.decode_ms([20])
    (one,) = answers(engine.run([ask("a", prompt, 40, deadline_ms=deadline_ms)])).values()
    assert one.finish_reason is FinishReason.DEADLINE
    assert len(one.token_ids) == 3


def test_every_answer_has_the_length_that_was_asked_for_in_letters() -> None:
    clock = ManualClock()
    requests = [ask(str(count), tokens_of(count, 9), count) for count in (1, 2, 17, 40)]
    for name, one in answers(engine_over(simulated(clock), clock).run(requests)).items():
        assert one.finish_reason is FinishReason.LENGTH
        assert len(one.text) == int(name)
        assert one.text.isalpha()


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), temperature=st.sampled_from([0.0, 0.7, 2.0]))
def test_an_answer_is_the_same_alone_and_together(lengths: list[int], temperature: float) -> None:
    clock = ManualClock()
    model = simulated(clock)
    requests = [
        ask(str(index), tokens_of(index, length), 5, temperature=temperature) for index, length in enumerate(lengths)
    ]
    together = answers(engine_over(model, clock).run(requests))
    for request in requests:
        (alone,) = answers(engine_over(model, clock, max_running=1).run([request])).values()
        assert together[request.request_id].token_ids == alone.token_ids


def test_different_prompts_get_different_answers() -> None:
    clock = ManualClock()
    requests = [ask(str(index), tokens_of(index, 9), 12) for index in range(8)]
    done = answers(engine_over(simulated(clock), clock).run(requests))
    assert len({one.token_ids for one in done.values()}) > 1


def test_a_token_that_is_decoded_or_prefilled_has_the_same_logits() -> None:
    runner = simulated(ManualClock()).make_runner(2, CHUNK)
    both = runner.forward([Piece(0, 5, [7]), Piece(1, 12, [9])])
    assert torch.equal(both[1], runner.forward([Piece(1, 12, [9])])[0])


def test_time_between_two_passes_is_not_the_device_s() -> None:
    clock = ManualClock()
    runner = simulated(clock).make_runner(1, CHUNK)
    runner.forward([Piece(0, 5, [1])])
    clock.advance(1000)
    before_ms = clock.monotonic_ms()
    runner.forward([Piece(0, 5, [1])])
    assert clock.monotonic_ms() - before_ms == pytest.approx(PROFILE.decode_ms([5]))


def test_late_wakings_do_not_add_up() -> None:
    clock = LateClock()
    clock.late_ms = 0.25
    timeline = Timeline(clock, clock.sleep)
    for _ in range(100):
        timeline.spend(2.0)
        clock.advance(1.0)
    assert clock.monotonic_ms() == pytest.approx(100 * (2.0 + 1.0) + 0.25)


def test_passes_shorter_than_a_late_waking_keep_their_mean() -> None:
    clock = LateClock()
    clock.late_ms = 1.0
    timeline = Timeline(clock, clock.sleep)
    for _ in range(100):
        timeline.spend(0.3)
    assert 30.0 - 1e-6 <= clock.monotonic_ms() <= 31.0 + 1e-6


def test_a_process_that_stood_still_does_not_catch_up() -> None:
    clock = LateClock()
    timeline = Timeline(clock, clock.sleep)
    clock.late_ms = 5000.0
    timeline.spend(2.0)
    clock.late_ms = 0.0
    before_ms = clock.monotonic_ms()
    for _ in range(50):
        timeline.spend(2.0)
    assert clock.monotonic_ms() - before_ms == pytest.approx(100 - MOST_LATE_MS)


def test_an_instant_device_never_waits() -> None:
    def wait(duration_ms: float) -> None:
        raise AssertionError(f"waited {duration_ms} ms")

    model = SimulatedModel(DeviceProfile.instant(), 0, MAX_LEN, ManualClock(), wait)
    engine = ContinuousEngine(model, EngineConfig(max_running=2), None, CHUNK, ManualClock())
    engine.warm_up()
    assert len(answers(engine.run([ask(str(index), tokens_of(index, 9), 5) for index in range(5)]))) == 5


def test_it_loads_from_a_profile_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(PROFILE.model_dump_json())
    model = load_simulated(EngineConfig(engine="simulated", profile=path), slot=3)
    assert model.name == "simulated-Toy"
    assert str(model.device) == "simulated:3"
    assert model.max_len == ROUND_NUMBERS["max_model_len"]
    assert model.chunk_shape(32).size == (2, 2, 2, 32, 4)
    assert model.chunk_shape(32).dtype == torch.bfloat16
    shorter = EngineConfig(engine="simulated", profile=path, max_model_len=50)
    assert load_simulated(shorter).max_len == 50


def test_prompts_of_the_model_s_own_tokens_are_taken() -> None:
    clock = ManualClock()
    engine = engine_over(simulated(clock), clock)
    (one,) = answers(engine.run([ask("a", [499, 498], 3)])).values()
    assert one.text.isalpha()
    with pytest.raises(UserError, match="outside the vocabulary of 500"):
        engine.submit(ask("b", [500], 3), 0.0)


def test_there_is_nothing_to_reuse() -> None:
    rows = simulated(ManualClock()).make_runner(1, CHUNK).pool
    with pytest.raises(UserError, match="--no-cache"):
        rows.load_chunks(0, [torch.zeros(1)])
    with pytest.raises(UserError, match="--no-cache"):
        rows.chunk_reader(0, 32)
