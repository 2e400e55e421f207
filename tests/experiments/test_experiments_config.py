"""From the command line to the jobs that are compared; what is wrong with it ends in one line and exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.config import JobConfig, Strategy
from core.errors import UserError
from core.model_path import with_model_found
from core.options import Parser, add_options, flatten, from_options, to_options
from experiments.config import (
    DECIDED,
    OWN_DEFAULTS,
    CacheExperimentConfig,
    cache_variants,
    check_writable,
    parse,
    with_addresses,
)


def parsed(*arguments: str) -> CacheExperimentConfig:
    return parse(CacheExperimentConfig, "test", "", list(arguments))


def test_without_options_every_strategy_is_compared() -> None:
    config = parsed()
    assert config.chosen == tuple(Strategy)
    assert "brokers" not in config.job.kafka.model_fields_set


def test_own_defaults_are_options_that_exist_and_can_be_overridden() -> None:
    leaves = dict(flatten(parsed()))
    assert {name: leaves[name] for name in OWN_DEFAULTS} == dict(OWN_DEFAULTS)
    assert parsed("--max-new-tokens", "5").workload.max_new_tokens == 5


def test_the_help_shows_the_defaults_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "asked for in phases, upper limit in mooncake (default: 16)" in said
    assert "--topic-prefix" not in said
    for option in ("--strategies", "--requests", "--workload", "--trace", "--model", "--parallelism", "--batch-size",
                   "--max-wait-ms", "--chunk-tokens", "--seed", "--out", "--brokers", "--redis-url", "--flink-url",
                   "--idle-timeout-s", "--from-raw"):  # fmt: skip
        assert option in said


def test_variants_differ_in_strategy_and_in_their_space_only() -> None:
    variants = cache_variants(parsed("--strategies", "fluid,STATIC", "--parallelism", "3"), "20260101-120000")
    assert [variant.name for variant in variants] == ["FLUID", "STATIC"]
    first, second = (dict(flatten(variant.job)) for variant in variants)
    assert first["topic_prefix"] == "cache-20260101-120000-fluid"
    assert {name for name in first if first[name] != second[name]} == set(DECIDED) - {"bounded"}
    assert {first["parallelism"], second["parallelism"]} == {3}


def test_what_is_submitted_is_what_the_job_reads() -> None:
    (variant,) = cache_variants(parsed("--strategies", "FREQUENCY", "--chunk-tokens", "16"), "x")
    job = with_addresses(variant.job, brokers="b:1", redis_url="redis://r:1/0")
    parser = Parser()
    add_options(parser, JobConfig)
    assert from_options(JobConfig, parser.parse_args(to_options(job))) == job


def test_a_model_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    job = parsed("--model", "./m").job
    assert with_model_found(job).engine.model == str(tmp_path / "m")
    for name in ("default", "Qwen/Qwen2.5-0.5B"):
        assert with_model_found(parsed("--model", name).job).engine.model == name


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out: cannot write"):
        check_writable(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategies", "STATIC,LRU"], "--strategies: unknown strategy LRU; choose of STATIC, FLUID, FREQUENCY"),
        (["--strategies", "STATIC,static"], "--strategies: a strategy is named twice"),
        (["--requests", "0"], "--requests: "),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--strategy", "FLUID"], "--strategy: the experiment sets it"),
        (["--topic-prefix", "mine"], "--topic-prefix: every run makes topics"),
        (["--workload", "mooncake", "--trace", "/nonexistent.jsonl"], "/nonexistent.jsonl"),
        (["--workload", "mooncake"], "--trace"),
        (["--model", "/nonexistent/model"], "--model: no config.json in '/nonexistent/model'"),
        (["--out", "/dev/null/out"], "--out: cannot write to /dev/null/out"),
        (["--from-raw", "/nonexistent"], "--from-raw: /nonexistent is no folder"),
        (["--brokers", "127.0.0.1:1"], "--brokers: no Kafka answers at 127.0.0.1:1"),
        (["--redis-url", "redis://127.0.0.1:1/0"], "--redis-url: no Redis answers"),
        (["--flink-url", "http://127.0.0.1:1"], "--flink-url: no Flink answers"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "experiments.cache_experiments", "--stack-dir", str(tmp_path / "stack")]
    if "--out" not in arguments:
        command += ["--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "stack").exists()
