import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.options import flatten
from core.records import Request
from operators.config import JobConfig
from workloads.catalogue import make_workload
from workloads.config import WorkloadConfig

Run = Callable[..., subprocess.CompletedProcess[str]]


def complaint(finished: subprocess.CompletedProcess[str]) -> str:
    """The error line of a refused command."""
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    return finished.stderr


def test_options_share_no_name_with_a_job_so_that_one_command_line_can_state_both() -> None:
    load = [name for name, _ in flatten(WorkloadConfig())]
    assert len(load) == len(set(load))
    assert not set(load) & {name for name, _ in flatten(JobConfig())}


def test_a_dry_run_prints_the_workload_the_same_in_every_process(run_workloads: Run) -> None:
    runs = [run_workloads("--dry-run", "--requests", "60", "--seed", "9", hash_seed=seed) for seed in ("1", "2")]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    printed = [Request.from_json(line) for line in runs[0].stdout.splitlines()]
    assert printed == [timed.created(timed.at_ms) for timed in make_workload(WorkloadConfig(requests=60, seed=9))]


@pytest.mark.parametrize("workload", ["mooncake", "azure", "burstgpt"])
def test_a_dry_run_of_a_trace_prints_token_ids(
    run_workloads: Run, any_trace: Path, any_azure_trace: Path, made_burstgpt_sessions: Path, workload: str
) -> None:
    trace = {"mooncake": any_trace, "azure": any_azure_trace, "burstgpt": made_burstgpt_sessions}[workload]
    finished = run_workloads("--dry-run", "--workload", workload, "--trace", str(trace), "--requests", "3")
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(lines) == 3
    assert all(line["prompt_token_ids"] and "prompt" not in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--workload", "nonsense"],
            "'phases', 'mooncake', 'azure', 'burstgpt' or 'independent'",
        ),
        (["--workload", "mooncake"], "--trace: the mooncake workload replays a trace; give its path"),
        (["--workload", "mooncake", "--trace", "/no/such/file"], "--trace: /no/such/file is not a file"),
        (["--workload", "azure"], "--trace: the azure workload replays a trace; give its path"),
        (["--workload", "burstgpt"], "--trace: the burstgpt workload replays a trace; give its path"),
        (["--bad-rows", "mend"], "--bad-rows: Input should be 'error' or 'skip'"),
        (["--failed-calls", "retry"], "--failed-calls: Input should be 'skip' or 'keep'"),
        (["--workload", "independent", "--prompt-tokens", "5000"], "--prompt-tokens: a mean of 5000 is above"),
        (["--requests", "0"], "--requests: Input should be greater than or equal to 1"),
        (["--brokers", "127.0.0.1:port"], "--brokers: 127.0.0.1:port is not host:port"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_what_the_user_gave_wrong_is_one_line_and_exit_2(run_workloads: Run, arguments: list[str], said: str) -> None:
    assert said in complaint(run_workloads(*arguments))


def test_a_bad_row_is_one_line_and_exit_2(run_workloads: Run, write_trace: Callable[..., Path]) -> None:
    trace = write_trace(['{"timestamp": 0}\n'])
    said = complaint(run_workloads("--dry-run", "--workload", "mooncake", "--trace", str(trace)))
    assert f"{trace}, line 1: input_length: missing" in said


def test_bad_rows_are_left_out_by_option(run_workloads: Run, write_trace: Callable[..., Path]) -> None:
    good = {"timestamp": 0, "input_length": 700, "output_length": 100, "hash_ids": [0, 1]}
    trace = write_trace(['{"timestamp": 0}\n', good, '{"timestamp": 0, "input_le'])
    finished = run_workloads("--dry-run", "--workload", "mooncake", "--trace", str(trace), "--bad-rows", "skip")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == 1


def test_kafka_that_does_not_answer_is_one_line_within_bounded_time(run_workloads: Run) -> None:
    began = time.monotonic()
    # Port 1 is reserved, and nothing listens on it.
    said = complaint(run_workloads("--brokers", "127.0.0.1:1"))
    assert "--brokers: Kafka at 127.0.0.1:1 does not answer" in said
    assert time.monotonic() - began < 15
