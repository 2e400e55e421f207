"""The batch analysis on the real Kafka and Flink: micro-batches and continuous batching on one small load."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.batch_metrics import COLUMNS
from experiments.records import read_runs
from local_stack import LocalStack

pytestmark = pytest.mark.integration


def test_a_batch_size_and_continuous_batching_on_one_load(stack: LocalStack, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "experiments.batch_analysis", "--stack-dir", str(stack.config.dir),
        "--out", str(tmp_path), "--batch-sizes", "4", "--max-wait-ms", "60", "--requests", "10", "--rate-per-s", "20",
        "--prompt-tokens", "16", "--answer-tokens", "4", "--max-new-tokens", "8",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    (csv,) = tmp_path.glob("batch_analysis_????????_??????.csv")
    results = pd.read_csv(csv)
    assert tuple(results.columns) == COLUMNS
    assert list(results["batch_size"]) == ["4", "continuous"]
    assert list(results["total_requests"]) == [10, 10]
    assert list(results["dead_letters"] + results["duplicates"]) == [0, 0]
    assert list(results["threads_per_slot"]) == [1, 1]
    assert results["max_batch_size"][0] <= 4
    assert csv.with_suffix(".png").stat().st_size > 50_000
    micro, continuous = read_runs(next((tmp_path / "raw").iterdir()))
    assert [sent.request_id for sent in micro.sent] == [sent.request_id for sent in continuous.sent]
    # Ten requests do not fit into two batches of four.
    assert len({answer.batch_id for answer in micro.responses}) >= 3
