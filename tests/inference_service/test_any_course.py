"""Requests come, fail, end early and are cancelled at random: each answer is the one that its request has alone."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from engine_helpers import CHUNK, MAX_LEN, MemoryCache, answers, ask, make_engine, plain_answer, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.records import FinishReason, Request
from inference_service.active_sequence import ActiveSequence, Piece
from inference_service.completion import Completion, Failure, TokenEvent
from inference_service.model import LoadedModel

MOST_NEW = 9
_BEGIN = tokens_of(1, 40)
PROMPTS = [_BEGIN[: 8 * chunks] + tokens_of(chunks, own) for chunks, own in ((0, 1), (0, 20), (1, 4), (2, 8), (5, 9))]
_alone: dict[tuple[int, int], list[tuple[int, ...]]] = {}


def alone(model: LoadedModel, request: Request) -> list[tuple[int, ...]]:
    """The answers to a request by itself: by `transformers` if it is greedy, by a fresh engine if it is sampled."""
    prompt = request.prompt_token_ids or ()
    if request.temperature is None:
        return [plain_answer(model, prompt, MOST_NEW)[: request.max_new_tokens]] * request.n
    key = id(model), PROMPTS.index(prompt)
    if key not in _alone:
        longest = request.model_copy(update={"max_new_tokens": MOST_NEW, "n": 6, "deadline_ms": None})
        (found,) = answers(make_engine(model).run([longest])).values()
        _alone[key] = [choice.token_ids for choice in found.choices]
    return [tokens[: request.max_new_tokens] for tokens in _alone[key][: request.n]]


class Course:
    """An engine to which random things happen: arrivals, failing passes and look-ups, deadlines, cancelling."""

    def __init__(self, model: LoadedModel, chance: random.Random) -> None:
        self.chance = chance
        self.model = model
        self.clock = ManualClock(1000.0)
        self.calm = chance.random() < 0.5
        """True if no request fails, times out or has a deadline."""
        self.cache = None
        if chance.random() < 0.6:
            self.cache = MemoryCache(model.chunk_shape(CHUNK), lambda index: "remote" if index % 2 else "local")
        self.begun: list[Request] = []
        self.engine = make_engine(
            model,
            cache=self.cache,
            clock=self.clock,
            max_running=chance.randint(1, 5),
            max_running_tokens=chance.choice([0, 0, MAX_LEN, 20]),
            step_prefill_tokens=chance.choice([0, 1, 3, 8, 20]),
            step_prefill_ms=chance.choice([0.0, 5.0]),
            request_timeout_ms=0.0 if self.calm else chance.choice([0.0, 150.0]),
            on_begin=self.begin,
        )
        self.forward = self.engine._runner.forward
        self.engine._runner.forward = self.failing_forward  # type: ignore[method-assign]
        self.poison: dict[str, tuple[str, int, int]] = {}
        """For each request to fail: how a pass fails, the choice at fault, and the place of its token."""
        self.requests: dict[str, Request] = {}
        self.gone: set[str] = set()
        self.done: dict[str, Completion | Failure] = {}
        self.told: dict[tuple[str, int], list[TokenEvent]] = {}

    def begin(self, requests: Sequence[Request]) -> None:
        for request in requests:
            assert request.request_id not in self.gone | self.done.keys()
            assert not any(one is request for one in self.begun)
        self.begun += requests

    def failing_forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        owners = {sequence.row: sequence for sequence in self.engine._rows}
        assert len(owners) == len(list(self.engine._rows))
        logits = self.forward(pieces)
        self.clock.advance(self.chance.random() * 6)
        for piece in pieces:
            kind = self.failure(owners[piece.row], piece)
            if kind == "raises":
                raise RuntimeError("no")
            if kind == "nan":
                self.engine._runner.pool._memory[:, :, piece.row, :, piece.end - 1] = torch.nan
        return logits

    def failure(self, sequence: ActiveSequence, piece: Piece) -> str | None:
        kind, choice, place = self.poison.get(sequence.request.request_id, ("", 0, 0))
        return kind if choice == sequence.choice and piece.start <= place < piece.end else None

    def submit(self) -> None:
        chance, name = self.chance, str(len(self.requests))
        prompt = chance.choice(PROMPTS)
        fields: dict[str, Any] = {
            "n": chance.choice([1, 1, 2, 3, 6]),
            "priority": chance.choice([0, 0, 1]),
            "created_at_ms": self.clock.wall_ms(),
        }
        if chance.random() < 0.5:
            fields |= {"temperature": 1.0, "seed": 7}
        if not self.calm and chance.random() < 0.2:
            fields["deadline_ms"] = chance.uniform(1, 80)
        if chance.random() < 0.2:
            fields["prompt_logprobs"] = 1
        if chance.random() < 0.3:
            fields["logprobs"] = 1
        request = ask(name, prompt, chance.randint(1, MOST_NEW), **fields)
        if not self.calm and chance.random() < 0.2:
            place = chance.randrange(len(prompt) + request.max_new_tokens)
            self.poison[name] = chance.choice(["raises", "nan"]), chance.randrange(request.n), place
        self.requests[name] = request
        listens = chance.random() < 0.5
        self.engine.submit(request, self.clock.wall_ms(), self.tell if listens else None)

    def tell(self, event: TokenEvent) -> None:
        assert event.request.request_id not in self.gone | self.done.keys()
        self.told.setdefault((event.request.request_id, event.choice), []).append(event)

    def cancel(self) -> None:
        name = self.chance.choice(list(self.requests))
        was_there = name not in self.gone | self.done.keys()
        assert self.engine.cancel(self.requests[name]) == was_there
        if was_there:
            self.gone.add(name)

    def step(self) -> None:
        if self.cache is not None and not self.calm:
            self.cache.refuses = {self.chance.choice(PROMPTS)} if self.chance.random() < 0.1 else set()
        for one in self.engine.step():
            name = one.request.request_id
            assert name not in self.gone | self.done.keys()
            self.done[name] = one
        assert [sequence.row for sequence in self.engine._rows.running] == list(range(len(self.engine._rows.running)))
        assert self.engine.unfinished == len(self.requests) - len(self.gone) - len(self.done)

    def run(self) -> None:
        for _ in range(8):
            self.submit()
            for _ in range(self.chance.randrange(5)):
                self.step()
            if self.chance.random() < 0.2:
                self.cancel()
        for _ in range(1500):
            if not self.engine.unfinished:
                break
            self.step()
        assert self.engine.unfinished == 0

    def check(self) -> None:
        engine = self.engine
        assert (list(engine._rows), engine._scheduler.waiting) == ([], 0)
        assert bool(engine._runner.pool._memory.isfinite().all())
        assert self.cache is None or self.cache.open_prefixes == 0
        assert self.gone | self.done.keys() == self.requests.keys()
        for name, one in self.done.items():
            request = self.requests[name]
            if isinstance(one, Failure):
                assert not self.calm
                expected = ["cache failed", "timeout"]
                if name in self.poison:
                    expected += ["prefill failed", "decode failed", "the model's values"]
                assert one.reason.startswith(tuple(expected)), one
                continue
            assert one.prompt_tokens == one.local_tokens + one.remote_tokens + one.computed_tokens
            for index, (choice, whole) in enumerate(zip(one.choices, alone(self.model, request), strict=True)):
                cut = choice.finish_reason is FinishReason.DEADLINE
                assert not cut or request.deadline_ms is not None
                tokens = whole[: len(choice.token_ids)] if cut else whole
                assert choice.token_ids == tokens
                if choice.logprobs is not None:
                    assert [each.token_id for each in choice.logprobs] == list(tokens)
                if (name, index) in self.told:
                    assert tuple(event.token_id for event in self.told[name, index]) == tokens
            if one.prompt_logprobs is not None and one.first_token_ms is not None:
                ids = [each and each.token_id for each in one.prompt_logprobs]
                assert ids == [None, *(request.prompt_token_ids or ())[1:]]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30))
def test_each_request_is_answered_as_if_it_were_alone(model: LoadedModel, seed: int) -> None:
    course = Course(model, random.Random(seed))
    course.run()
    course.check()
