"""The command line in a report."""

import sys
from pathlib import Path

import pytest

from benchmarks.report import conditions_of


def test_a_command_names_the_user_s_own_files_without_their_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace = tmp_path / "trace of mine.csv"
    trace.touch()
    arguments = ["-m", "benchmarks.batching", "--trace", str(trace), "--out", "results/benchmarks/batching.json"]
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *arguments, "--model", str(tmp_path / "none")])
    command = conditions_of({}, {}, redis_url=None)["command"]
    assert command == (
        "python -m benchmarks.batching --trace 'trace of mine.csv' --out results/benchmarks/batching.json "
        f"--model {tmp_path / 'none'}"
    )
