"""From records to files: the CSV's columns, a figure with something on it, and a rebuild that gives the same."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from experiment_samples import BEGIN_MS, dead_letter, made_run, made_runs, response, run_of
from rich.console import Console

from cache.registry import SIZING
from experiments import metrics
from experiments.cache_figure import cache_figure, run_colours
from experiments.cache_metrics import COLUMNS, SHOWN, table
from experiments.figures import caption
from experiments.records import write_run
from experiments.report import notes, show, write_csv
from experiments.timeline import phases, rolling_local_hit_rate, summed_over_slots
from workloads.phases import PHASES, phase_of


def test_the_csv_has_the_seeds_header_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(table(made_runs(20)), path)
    header, *rows = path.read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert header.startswith("strategy,total_requests,cache_hits,hit_rate_percent,avg_latency_ms,strategy_config,")
    assert [row.split(",")[0] for row in rows] == list(SIZING)


def test_the_figure_shows_every_strategy_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cache_figure(made_runs(), path)
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[0] > 1000
    assert image.shape[1] > 1500
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        distance = abs(image - [part / 255 for part in colour]).max(axis=2)
        assert (distance < 0.01).sum() > 5000, colour


def test_a_strategy_without_a_colour_of_its_own_gets_one_that_no_run_has(tmp_path: Path) -> None:
    colours = run_colours([made_run("STATIC", 0, 4), made_run("OTHER", 1, 4), made_run("STATIC", 2, 4)])
    assert len(set(colours)) == 3


def test_the_figure_needs_an_answer_but_not_of_every_run(tmp_path: Path) -> None:
    empty = run_of(dead_letters=(dead_letter(),))
    with pytest.raises(ValueError, match="nothing to draw"):
        cache_figure([empty], tmp_path / "a.png")
    cache_figure([empty, run_of(response())], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_caption_names_model_device_workload_rate_and_what_else_holds() -> None:
    said = caption(made_runs(20), "two slots")
    for part in ("random-qwen2-30m", "device cpu", "phases workload", "3.03 requests/s", "two slots"):
        assert part in said


def test_phases_are_those_of_the_workload() -> None:
    run = made_run("STATIC", 0)
    found = phases(run)
    assert [stretch.name for stretch in found] == [f"{phase.users} users" for phase in PHASES]
    for index, sent in enumerate(run.sent):
        at_s = (sent.created_at_ms - BEGIN_MS) / 1000
        holding = [s.name for s in found if s.begin_s <= at_s < s.end_s or at_s == s.end_s == found[-1].end_s]
        assert holding == [f"{phase_of(index, 200).users} users"]


def test_slots_are_added_once_all_have_been_seen() -> None:
    times = {"ttft_ms": 10, "tpot_ms": None, "inference_ms": 10, "e2e_ms": 10}
    made = [
        response(slot=slot, created_at_ms=BEGIN_MS + at_ms, cache_capacity_chunks=chunks, **times)
        for slot, at_ms, chunks in ((0, 0, 5), (1, 1000, 7), (0, 2000, 6))
    ]
    seconds, chunks = summed_over_slots(metrics.frame(made), "cache_capacity_chunks", BEGIN_MS)
    assert list(seconds) == [1.0, 2.0]
    assert list(chunks) == [12, 13]


def test_the_rolling_rate_looks_back_over_so_many_requests() -> None:
    made = [
        response(created_at_ms=BEGIN_MS + 1000 * n, local_tokens=10 * (n % 2), computed_tokens=10) for n in range(4)
    ]
    _, percent = rolling_local_hit_rate(metrics.frame(made), 2, BEGIN_MS)
    assert list(percent)[1:] == pytest.approx([100 / 3] * 3)


def test_the_table_says_what_limits_its_meaning() -> None:
    run = run_of(response(), dead_letters=(dead_letter(reason="bad field"),), failures=("a worker died",), duplicates=2)
    said = "\n".join(notes([run]))
    assert "random weights" in said
    assert "bad field" in said
    assert "a worker died" in said
    assert "STATIC: 2 answers came twice" in said
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    show(table([run]), SHOWN, ["what limits it"], console)
    shown = console.export_text()
    assert "STATIC" in shown
    assert "what limits it" in shown


def test_from_raw_makes_csv_and_figure_again(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    for run in made_runs(30):
        write_run(raw, run)
    command = [sys.executable, "-m", "experiments.cache_experiments", "--from-raw", str(raw), "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert first.returncode == 0, first.stderr
    csv = out / "cache_experiments_20260101_120000.csv"
    assert str(csv) in first.stdout
    assert (out / "cache_experiments_20260101_120000.png").stat().st_size > 50_000
    pd.testing.assert_frame_equal(pd.read_csv(csv), table(made_runs(30)).round(6), check_dtype=False)


def test_records_of_another_experiment_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "raw", made_run("STATIC", 0, requests=4))
    command = [sys.executable, "-m", "experiments.gpu_scaling", "--from-raw", str(tmp_path / "raw")]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "holds records of cache_experiments, not of gpu_scaling" in done.stderr
