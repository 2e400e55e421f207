"""The comparison with alternatives: its figures, its loads, and its refusal of different answers."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.alternatives import (
    COMMAND,
    LOADS,
    MULTI_TURN,
    NO_REUSE,
    OURS,
    AlternativesConfig,
    Layout,
    book,
    fastest,
    figures_of,
    load_of,
    measure,
    mismatched,
    require_equal_answers,
    round_of,
)
from benchmarks.baselines.contenders import Taken, orders_of
from benchmarks.baselines.worker import Answers
from benchmarks.reuse_probe import WrongMeasurementError
from core.errors import UserError
from workloads.timed_request import Workload

FIGURES = {
    "over_consumer_loop_no_reuse",
    "over_consumer_loop_multi_turn",
    "over_transformers_continuous",
    "over_run_inference",
}


class TimedContender:
    """Answers in a given time, and records the order of the turns."""

    def __init__(self, name: str, took_s: float, answers: Answers, turns: list[str]) -> None:
        self._name = name
        self._taken = Taken(took_s, answers)
        self._turns = turns

    def answer(self, workload: Workload) -> Taken:
        self._turns.append(self._name)
        return self._taken


def made_samples(rounds: int, their_s: float, their_answers: Answers) -> dict[str, list[float]]:
    """Our job takes 2 s for two answers with three tokens in all; every alternative takes `their_s`."""
    samples: dict[str, list[float]] = {}
    ours = {"a": [1, 2], "b": [3]}
    for load, alternatives in LOADS.items():
        taken = {OURS: Taken(2.0, ours)} | {name: Taken(their_s, their_answers) for name in alternatives}
        series = {f"{load}_{name}_{kind}" for name in taken for kind in ("s", "tokens_per_s", "requests_per_s")}
        series |= {f"{load}_{name}_{kind}" for name in alternatives for kind in ("answers", "mismatched")}
        samples |= {name: [] for name in series}
        for _ in range(rounds):
            book(samples, load, taken)
    return samples


def config_of(*options: str) -> AlternativesConfig:
    return COMMAND.parse(list(options))


def test_a_figure_above_one_means_that_ours_is_faster() -> None:
    figures = figures_of(made_samples(3, 5.0, {"a": [1, 2], "b": [3]}))
    for name in FIGURES:
        assert [figures[name], figures[f"{name}_p25"], figures[f"{name}_p75"]] == [2.5, 2.5, 2.5]
    assert figures["no_reuse_ours_tokens_per_s"] == 1.5
    assert figures["no_reuse_run_inference_tokens_per_s"] == 0.6
    assert figures["multi_turn_ours_requests_per_s"] == 1.0
    assert figures["answers_consumer_loop_multi_turn"] == 6
    assert all(value == 0 for name, value in figures.items() if name.startswith("mismatched_"))


def test_answers_that_differ_are_counted_and_end_the_run_above_the_share() -> None:
    figures = figures_of(made_samples(2, 5.0, {"a": [1, 2], "b": [4]}))
    assert figures["mismatched_answers_run_inference"] == 2
    require_equal_answers(figures, most=0.5)
    with pytest.raises(WrongMeasurementError, match="mismatched_answers_consumer_loop_no_reuse is 2 of 4"):
        require_equal_answers(figures, most=0.4)


def test_answers_to_other_requests_end_the_run() -> None:
    assert mismatched("loop", {"a": [1], "b": [2]}, {"a": [1], "b": [3]}) == 1
    with pytest.raises(WrongMeasurementError, match="loop answered 1 requests and ours 2"):
        mismatched("loop", {"a": [1]}, {"a": [1], "b": [3]})


def test_the_order_turns() -> None:
    turns: list[str] = []
    contenders = {name: TimedContender(name, 1.0, {}, turns) for name in ("ours", "loop", "beam")}
    workload = load_of(AlternativesConfig(), NO_REUSE, 1, 0)
    assert list(round_of(contenders, workload, turned=False)) == ["ours", "loop", "beam"]
    round_of(contenders, workload, turned=True)
    assert turns == ["ours", "loop", "beam", "beam", "loop", "ours"]


def test_the_layout_with_most_tokens_a_second_counts() -> None:
    assert fastest({Layout(1, 2): 30.0, Layout(2, 1): 41.0, Layout(1, 1): 40.0}) == Layout(2, 1)


def test_a_round_has_requests_of_its_own() -> None:
    config = AlternativesConfig()
    for load in LOADS:
        once, again, other = (list(load_of(config, load, 6, seed)) for seed in (1, 1, 2))
        assert once == again
        assert not {timed.request_id for timed in once} & {timed.request_id for timed in other}
        assert once[0].prompt_token_ids != other[0].prompt_token_ids or once[0].prompt != other[0].prompt


def test_conversations_share_their_beginning_and_the_other_requests_do_not() -> None:
    config = AlternativesConfig(system_prompt_tokens=100)
    turns = [timed.prompt or "" for timed in load_of(config, MULTI_TURN, 20, 0)]
    assert len({prompt[:100] for prompt in turns}) == 1
    alone = [timed.prompt_token_ids or () for timed in load_of(config, NO_REUSE, 20, 0)]
    assert len({prompt[:8] for prompt in alone}) == 20


def test_a_trace_gives_its_lengths_scaled(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,800,80", "2023-11-16 18:15:50.9951690,400,8000"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    config = config_of(f"--trace={trace}", "--prompt-scale=0.1", "--answer-scale=0.1")
    found = [(len(one.prompt_token_ids or ()), one.max_new_tokens) for one in load_of(config, NO_REUSE, 2, 0)]
    assert found == [(80, 8), (40, config.max_answer_tokens)]


def test_requests_are_dealt_out_to_processes() -> None:
    requests = [timed.created(0.0) for timed in load_of(AlternativesConfig(), NO_REUSE, 5, 0)]
    first, second = orders_of(requests, 2)
    assert first.requests == tuple(requests[0::2])
    assert second.requests == tuple(requests[1::2])


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--layouts=2y1", r"--layouts: '2y1' is not PROCESSESxTHREADS"),
        ("--layouts=0x1", r"--layouts: '0x1' is not PROCESSESxTHREADS"),
        ("--rounds=0", r"--rounds: "),
        ("--brokers=other:9092", r"--brokers: all run on the local stack"),
    ],
)
def test_a_bad_option_is_one_line(option: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        config_of(option)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--device=cuda"], "--device: "),
        (["--trace=/nowhere.csv"], "--trace: /nowhere.csv is not a file"),
        (["--prompt-tokens=144", "--max-prompt-tokens=100"], "--prompt-tokens: "),
        (["--max-prompt-tokens=1900", "--max-answer-tokens=500"], "--max-prompt-tokens: "),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(options: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        measure(config_of(*options), Console())
