"""The batch analysis' result file and figure, from given records."""

import math
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from experiment_samples import dead_letter, made_batch_run, made_batch_runs, response, run_of

from experiments.batch_figure import batch_figure
from experiments.batch_metrics import COLUMNS, SHOWN, full_batches_percent, notes, row, table
from experiments.metrics import frame
from experiments.report import write_csv
from operators.config import Batching, BatchingConfig, JobConfig

SEED_HEADER = "batch_size,avg_wait_ms,avg_latency_ms,throughput_req_per_sec,total_requests,efficiency_notes"


def test_the_csv_has_the_seeds_header_first_and_a_row_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(table(made_batch_runs()), path)
    header, *rows = path.read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert header.startswith(SEED_HEADER + ",")
    assert [line.split(",")[0] for line in rows] == ["1", "2", "4", "8", "continuous"]
    assert {name for _, name, _ in SHOWN} <= set(COLUMNS)


def test_a_batch_that_is_not_full_was_closed_by_time() -> None:
    made = [response(request_id=str(n), batch_id="x", batch_size=4) for n in range(4)]
    made += [response(request_id="4", batch_id="y", batch_size=1), response(request_id="5", batch_id="z", batch_size=1)]
    job = JobConfig(batching=BatchingConfig(batching=Batching.MICRO, batch_size=4))
    run = run_of(*made, job=job)
    assert full_batches_percent(run, frame(made)) == pytest.approx(100 / 3)
    values = row(run)
    assert (values["avg_batch_size"], values["p50_batch_size"], values["max_batch_size"]) == (2.0, 1.0, 4.0)
    assert (values["batch_size"], values["max_wait_ms"]) == (4, 100.0)


def test_a_row_is_compared_with_the_smallest_batches() -> None:
    one, two, *_, continuous = made_batch_runs()
    results = table([continuous, two, one])
    said = dict(zip(results["batch_size"], results["efficiency_notes"], strict=True))
    numbers = results.set_index("batch_size")
    factor = numbers["throughput_req_per_sec"][2] / numbers["throughput_req_per_sec"][1]
    p95 = numbers["p95_latency_ms"][2] / numbers["p95_latency_ms"][1]
    assert said[2] == f"{factor:.2f}x the throughput of batch 1 at {p95:.2f}x its p95; 0 % of batches closed by time"
    assert said["continuous"].endswith("5.0 sequences decode together")
    assert "x the" not in said[1]


def test_without_a_batch_size_the_continuous_row_stands_alone() -> None:
    (note,) = table([made_batch_run(None, 0, 330.0)])["efficiency_notes"]
    assert "x the" not in note


def test_what_does_not_exist_where_continuous_is_an_empty_cell() -> None:
    values = row(made_batch_run(None, 0, 330.0))
    assert math.isnan(values["full_batches_percent"])
    assert math.isnan(values["max_wait_ms"])


def test_a_run_without_answers_is_a_row_of_empty_cells() -> None:
    job = JobConfig(batching=BatchingConfig(batching=Batching.MICRO, batch_size=8))
    results = table([made_batch_run(1, 0, 330.0), run_of(dead_letters=(dead_letter(),), job=job)])
    assert list(results["total_requests"]) == [60, 0]
    assert pd.isna(results["busy_share_percent"][1])
    assert results["efficiency_notes"][1] == "nothing to compare"


def test_a_row_that_the_load_is_too_much_for_is_named() -> None:
    said = "\n".join(notes(made_batch_runs()))
    assert "batch_1: answers at 1.6" in said
    assert "batch_4: answers at" not in said
    assert "continuous: answers at" not in said


def test_the_figure_shows_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    batch_figure(made_batch_runs(), path)
    image = matplotlib.image.imread(path)[..., :3]
    for colour in ((0x85, 0xBC, 0xDC), (0x08, 0x30, 0x6B), (0xD5, 0x5E, 0x00)):
        distance = abs(image - [part / 255 for part in colour]).max(axis=2)
        assert (distance < 0.01).sum() > 3000, colour


def test_the_figure_needs_an_answer_but_not_of_every_run(tmp_path: Path) -> None:
    empty = run_of(dead_letters=(dead_letter(),))
    with pytest.raises(ValueError, match="nothing to draw"):
        batch_figure([empty], tmp_path / "a.png")
    batch_figure([empty, run_of(response())], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
