"""The scaling experiment on the real Kafka and Flink: one backlog on one slot and on two."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.records import read_runs
from experiments.scaling_metrics import COLUMNS
from local_stack import LocalStack

pytestmark = pytest.mark.integration


def test_one_slot_and_two_answer_the_same_backlog(stack: LocalStack, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "experiments.gpu_scaling", "--stack-dir", str(stack.config.dir), "--out", str(tmp_path),
        "--parallelisms", "1,2", "--requests", "10", "--prompt-tokens", "16", "--answer-tokens", "4",
        "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    (csv,) = tmp_path.glob("gpu_scaling_????????_??????.csv")
    results = pd.read_csv(csv)
    assert tuple(results.columns) == COLUMNS
    assert list(results["parallelism"]) == [1, 2]
    assert list(results["gpu_distribution"]) == ["CPU0:10", "CPU0:5;CPU1:5"]
    assert list(results["dead_letters"] + results["duplicates"]) == [0, 0]
    assert results["scale_factor"][0] == 1
    assert "it is cores that scale" in done.stdout
    assert csv.with_suffix(".png").stat().st_size > 50_000
    for run in read_runs(next((tmp_path / "raw").iterdir())):
        assert run.manifest.load.offered_rate is None
