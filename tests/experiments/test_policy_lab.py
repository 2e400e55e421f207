"""The policy lab on small generated loads, its bounds against a search of all choices, and its files."""

import csv
import itertools
import json
import random
import sys
from functools import cache
from pathlib import Path

import hypothesis
import matplotlib.image
import pytest
from hypothesis import strategies as st

from cache.config import SizingConfig
from cache.eviction import make_eviction
from cache.eviction.leader import FollowTheLeader
from cache.registry import EVICTION
from cache.sizing import make_sizing
from core.errors import UserError
from experiments.lab import bounds
from experiments.lab.config import Drive, LabConfig
from experiments.lab.drive import run
from experiments.lab.load import make_load
from experiments.lab.table import rows, steps, table
from experiments.policy_lab import COMMAND, main
from workloads.block_trace import BlockRequest

HEADER = (
    "trace,eviction,sizing,capacity_chunks,requests,accesses,hits,hit_ratio,prefix_hits,prefix_hit_ratio,"
    "token_hit_ratio,mean_capacity_chunks,peak_capacity_chunks,chunk_seconds,runtime_s"
)


def request(at_ms: float, *blocks: int, tokens: int | None = None) -> BlockRequest:
    return BlockRequest(at_ms, blocks, 512 * len(blocks) if tokens is None else tokens, 512)


def singles(numbers) -> list[BlockRequest]:
    return [request(1000.0 * place, number) for place, number in enumerate(numbers)]


def served(load, eviction="LRU", capacity=4, drive=Drive.REQUEST, **sizing):
    config = SizingConfig(capacity_chunks=capacity, **sizing)
    return run(load, make_eviction(eviction), make_sizing(config), drive)


def conversations(requests: int, seed: int = 0) -> list[BlockRequest]:
    """Turns of conversations, some of which go on; all begin with block 0."""
    draw = random.Random(seed)
    going, fresh, made = [], 1, []
    for place in range(requests):
        goes_on = going and draw.random() < 0.45
        blocks = going.pop(draw.randrange(len(going))) if goes_on else (0,)
        new = draw.randint(1, 6)
        blocks = (*blocks, *range(fresh, fresh + new))
        fresh += new
        if draw.random() < 0.6:
            going.append(blocks)
        made.append(request(1000.0 * place, *blocks))
    return made


@pytest.mark.parametrize("name", ["LRU", "DENSITY"])
@pytest.mark.parametrize("capacity", [1, 7, 40, 150])
def test_a_tier_that_follows_one_leader_hits_what_that_policy_hits(name, capacity):
    """Exactly: its shadow keeps what the cache manager would have kept."""
    load = conversations(400, seed=capacity)
    leading = FollowTheLeader(make_eviction(name), make_eviction(name))
    sizing = make_sizing(SizingConfig(capacity_chunks=capacity))
    followed = run(load, leading, sizing, Drive.REQUEST)
    alone = served(load, name, capacity)
    assert (followed.hits, followed.prefix_hits) == (alone.hits, alone.prefix_hits)
    assert followed.hits > 0


def test_hits_prefix_hits_and_tokens_of_a_load_by_hand() -> None:
    load = [
        request(0, 1, 2, 3),
        request(2000, 1, 2, 3, 4, tokens=1600),
        request(3000, 1, 9),
        request(5000, 7, 2),  # 2 is resident, but 7 before it is not.
    ]
    outcome = served(load, capacity=8)
    assert (outcome.requests, outcome.accesses) == (4, 11)
    assert (outcome.hits, outcome.prefix_hits) == (3 + 1 + 1, 3 + 1)
    assert (outcome.tokens, outcome.hit_tokens) == (3 * 512 + 1600 + 4 * 512, 3 * 512 + 512)
    assert outcome.chunk_ms == 8 * 5000


def test_a_prompt_whose_last_block_is_partial_never_hits_more_tokens_than_it_has() -> None:
    outcome = served([request(0, 1, 2, tokens=600), request(1, 1, 2, tokens=600)])
    assert (outcome.hit_tokens, outcome.tokens) == (600, 1200)


@pytest.mark.parametrize("drive", Drive)
def test_the_integral_of_the_capacity_is_over_virtual_time(drive: Drive) -> None:
    """FLUID decides at every request: the first sets its average, a burst then makes it grow."""
    load = [request(at_ms, 1) for at_ms in (0, 10_000, 10_100, 10_200, 20_200)]
    outcome = served(
        load,
        capacity=8,
        drive=drive,
        strategy="FLUID",
        min_capacity_chunks=4,
        max_capacity_chunks=16,
        adjust_every_requests=1,
    )
    # By hand: rates 1, 1, 2, 3, 1 a second; averages 1, 1, 1.3, 1.81; 8 grows to 10 and 13, then shrinks to 11.
    assert outcome.chunk_ms == 8 * 10_000 + 8 * 100 + 10 * 100 + 13 * 10_000
    assert outcome.peak_capacity_chunks == 13
    assert outcome.mean_capacity_chunks == outcome.chunk_ms / 20_200


@pytest.mark.parametrize("eviction", list(EVICTION))
@pytest.mark.parametrize("drive", Drive)
def test_no_policy_beats_the_optimum_and_all_meet_it_with_room_for_everything(eviction: str, drive: Drive) -> None:
    load = conversations(300)
    endless = bounds.infinite(load)
    distinct = endless.peak_capacity_chunks
    upcoming = bounds.next_uses(load)
    assert served(load, eviction, distinct, drive).hits == endless.hits
    for capacity in (5, 20, 80):
        best = bounds.belady(load, upcoming, capacity, bypass=True)
        assert served(load, eviction, capacity, Drive.ACCESS).hits <= best.hits <= endless.hits


def most_hits(numbers: tuple[int, ...], capacity: int, bypass: bool) -> int:
    """The maximum number of hits, found by trying every choice."""

    @cache
    def from_here(place: int, held: frozenset[int]) -> int:
        if place == len(numbers):
            return 0
        block = numbers[place]
        if block in held:
            return 1 + from_here(place + 1, held)
        choices = [held] if bypass else []
        if len(held) < capacity:
            choices.append(held | {block})
        else:
            choices += [held - {other} | {block} for other in held]
        return max(from_here(place + 1, choice) for choice in choices)

    return from_here(0, frozenset())


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 3), st.booleans())
def test_belady_is_the_best_of_all_choices(numbers: list[int], capacity: int, bypass: bool) -> None:
    load = singles(numbers)
    outcome = bounds.belady(load, bounds.next_uses(load), capacity, bypass=bypass)
    assert outcome.hits == most_hits(tuple(numbers), capacity, bypass)


def test_bypass_is_worth_it_where_most_blocks_come_once() -> None:
    load = singles([1, 10, 1, 11, 1, 12, 1])
    upcoming = bounds.next_uses(load)
    assert bounds.belady(load, upcoming, 1, bypass=True).hits == 3
    assert bounds.belady(load, upcoming, 1, bypass=False).hits == 0


def conversation_trace(folder: Path, requests: int = 200) -> Path:
    path = folder / "made.jsonl"
    with path.open("w") as file:
        for made in conversations(requests):
            row = {"timestamp": made.at_ms, "input_length": made.tokens, "output_length": 1, "hash_ids": made.blocks}
            file.write(json.dumps(row) + "\n")
    return path


def parsed(*arguments: str) -> LabConfig:
    return COMMAND.parse(list(arguments))


def test_every_combination_is_a_row_and_bounds_stand_beside(tmp_path: Path) -> None:
    config = parsed(
        *("--trace", str(conversation_trace(tmp_path)), "--format", "mooncake", "--capacity", "10,40"),
        *("--eviction", "lru,density", "--sizing", "static,frequency", "--target-prefix-hit-ratio", "0.2"),
    )
    told: list[str] = []
    found = table(list(rows(config, make_load(config), "made", told.append)))
    names = list(zip(found["eviction"], found["sizing"], found["capacity_chunks"], strict=True))
    assert names[:8] == [
        (eviction, sizing, capacity)
        for eviction in ("lru", "density")
        for sizing in ("static", "frequency")
        for capacity in (10, 40)
    ]
    assert [name[0] for name in names[8:13]] == ["infinite", "belady", "belady", "belady-bypass", "belady-bypass"]
    assert [name[:2] for name in names[13:]] == [("lru", "best-static"), ("density", "best-static")]
    assert steps(config) == len(names)
    assert told[:2] == ["lru static 10", "lru static 40"]
    assert told[8:13] == ["infinite", "belady 10", "belady 40", "belady-bypass 10", "belady-bypass 40"]
    assert {doing.partition(",")[0] for doing in told[13:]} == {"lru best-static", "density best-static"}
    assert set(found["accesses"]) == {sum(len(made.blocks) for made in conversations(200))}


def test_best_static_reaches_its_target_and_one_chunk_less_does_not(tmp_path: Path) -> None:
    config = parsed(
        *("--trace", str(conversation_trace(tmp_path)), "--format", "mooncake", "--capacity", "10"),
        *("--eviction", "lru", "--no-bounds", "--target-prefix-hit-ratio", "0.3"),
    )
    best = table(list(rows(config, make_load(config), "made"))).iloc[-1]
    assert best["sizing"] == "best-static"
    assert best["prefix_hit_ratio"] >= 0.3
    less = served(conversations(200), "LRU", int(best["capacity_chunks"]) - 1)
    assert less.prefix_hits / less.accesses < 0.3


def test_a_target_beyond_an_infinite_cache_has_no_row(tmp_path: Path) -> None:
    config = parsed(
        *("--trace", str(conversation_trace(tmp_path)), "--format", "mooncake", "--capacity", "10"),
        *("--eviction", "lru", "--no-bounds", "--target-prefix-hit-ratio", "0.99"),
    )
    assert [row.sizing for row in rows(config, make_load(config), "made")] == ["static"]


def test_the_phases_load_shares_its_prefixes() -> None:
    config = parsed("--requests", "60", "--capacity", "64", "--eviction", "lru")
    load = list(make_load(config)())
    assert len(load) == 60
    assert all(len(made.blocks) == made.tokens // 32 for made in load), "only full chunks are cached"
    system = {made.blocks[:8] for made in load}
    assert len(system) == 1, "the system prompt of 256 tokens is everybody's first 8 chunks"
    assert list(make_load(config)()) == load
    assert served(load, capacity=64).prefix_hits > 0


def test_bursts_are_made_anew_at_each_reading() -> None:
    config = parsed("--format", "bursts", "--capacity", "64", "--requests", "300", "--seed", "3")
    load = list(make_load(config)())
    assert len(load) == 300
    assert list(make_load(config)()) == load
    gaps = sorted(later.at_ms - earlier.at_ms for earlier, later in itertools.pairwise(load))
    assert gaps[0] >= 0
    assert gaps[-1] > 10 * gaps[len(gaps) // 2], "bursts and lulls"
    assert served(load, capacity=200).prefix_hits > 300 * 8


def test_rows_that_are_left_out_are_counted_once_however_often_the_trace_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    trace = conversation_trace(tmp_path)
    trace.write_text("no row\n" + trace.read_text() + "nor this\n")
    arguments = ["--trace", str(trace), "--format", "mooncake", "--capacity", "10", "--eviction", "lru,fifo"]
    monkeypatch.setattr(
        sys, "argv", ["policy_lab", *arguments, "--bad-rows", "skip", "--out", str(tmp_path / "lab.csv")]
    )
    main()
    assert "skipped bad rows: 2\n" in capsys.readouterr().out


def test_the_command_writes_a_csv_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "lab.csv"
    arguments = ["--trace", str(conversation_trace(tmp_path)), "--format", "mooncake", "--capacity", "10,40"]
    arguments += ["--eviction", "lru,density", "--sizing", "static,fluid", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["policy_lab", *arguments])
    main()
    header, *lines = out.read_text().splitlines()
    assert header.startswith(HEADER + ",")
    assert len(lines) == 8 + 5
    first = next(csv.DictReader(out.open()))
    assert first["trace"] == "made.jsonl"
    assert float(first["hit_ratio"]) == pytest.approx(int(first["hits"]) / int(first["accesses"]), abs=1e-6)
    for name in ("lab.png", "lab_over_time.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0
    assert "belady-bypass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--eviction", "lru,clock"], "--eviction: unknown policy clock; choose from lru, fifo"),
        (["--sizing", "static,static"], "--sizing: a policy is named twice"),
        (["--capacity", "0"], "--capacity: '0' is not a whole number from 1"),
        (["--format", "azure"], "--trace is missing"),
        (["--trace", "x.jsonl"], "--trace is not read with --format phases"),
        (["--capacity-chunks", "5"], "--capacity-chunks: name the capacities to compare with --capacity"),
    ],
)
def test_bad_options_are_named(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(*arguments)
    assert said in str(error.value)


def test_a_trace_that_is_missing_is_named(tmp_path: Path) -> None:
    config = parsed("--format", "azure", "--trace", str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"--trace: .*none.csv is not a file"):
        make_load(config)
