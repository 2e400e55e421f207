"""From the command line to the compared jobs; wrong options end with one line and exit status 2."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cache.registry import EVICTION, SIZING
from core.default_slot import default_slot
from core.errors import UserError
from core.kafka_config import KafkaAccessConfig, KafkaConfig, KafkaSecurity
from core.options import Parser, add_options, flatten, from_options, to_options
from experiments import batch_analysis, gpu_scaling
from experiments.cache_experiments import COMMAND, CacheExperimentConfig, variants
from experiments.config import (
    DECIDED,
    Command,
    RunConfig,
    check_writable,
    distinct_numbers,
    with_addresses,
    with_profile_found,
)
from experiments.services import services
from operators.config import JobConfig
from operators.job_files import with_absolute_paths
from workloads.catalogue import make_workload


def parsed(*arguments: str) -> CacheExperimentConfig:
    return COMMAND.parse(list(arguments))


def test_without_options_every_strategy_is_compared() -> None:
    config = parsed()
    assert config.chosen == tuple(SIZING)
    assert "brokers" not in config.job.kafka.model_fields_set


def test_own_defaults_are_options_that_exist_and_can_be_overridden() -> None:
    for command in (COMMAND, batch_analysis.COMMAND, gpu_scaling.COMMAND):
        leaves = dict(flatten(command.parse([])))
        assert {name: leaves[name] for name in command.own_defaults} == dict(command.own_defaults)
        assert set(command.decided) <= set(leaves)
    assert parsed("--max-new-tokens", "5").workload.max_new_tokens == 5


def test_the_help_shows_the_defaults_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "upper limit of it in all other workloads (default: 16)" in said
    assert "--topic-prefix" not in said
    for option in ("--strategies", "--eviction", "--requests", "--workload", "--trace", "--model", "--parallelism",
                   "--batch-size", "--max-wait-ms", "--chunk-tokens", "--seed", "--out", "--brokers", "--redis-url",
                   "--flink-url", "--idle-timeout-s", "--from-raw"):  # fmt: skip
        assert option in said


def test_variants_differ_in_strategy_and_in_their_space_only() -> None:
    found = variants(parsed("--strategies", "fluid,STATIC", "--parallelism", "3"), "20260101-120000")
    assert [variant.name for variant in found] == ["FLUID", "STATIC"]
    first, second = (dict(flatten(variant.job)) for variant in found)
    assert first["topic_prefix"] == "cache-20260101-120000-fluid"
    assert {name for name in first if first[name] != second[name]} == {"strategy"} | set(DECIDED) - {"bounded"}
    assert {first["parallelism"], second["parallelism"]} == {3}


def test_eviction_policies_multiply_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [variant.job.cache.eviction for variant in variants(parsed("--eviction", "lru"), "x")] == ["LRU"] * 4

    monkeypatch.setattr(EVICTION, "places", {"LRU": "cache.eviction.lru:LRU", "Other": "cache.eviction.fifo:FIFO"})
    found = variants(parsed("--strategies", "static, mrc", "--eviction", "OTHER,LRU"), "x")
    assert [variant.name for variant in found] == ["STATIC-Other", "STATIC-LRU", "MRC-Other", "MRC-LRU"]
    assert [str(variant.job.cache.eviction) for variant in found] == ["Other", "LRU"] * 2
    assert len({variant.job.kafka.topic_prefix for variant in found}) == 4
    assert found[2].job.kafka.topic_prefix == "cache-x-mrc-other"


def test_what_is_submitted_is_what_the_job_reads() -> None:
    (variant,) = variants(parsed("--strategies", "FREQUENCY", "--chunk-tokens", "16"), "x")
    job = with_addresses(variant.job, brokers="b:1", redis_url="redis://r:1/0")
    parser = Parser()
    add_options(parser, JobConfig)
    assert from_options(JobConfig, parser.parse_args(to_options(job))) == job


def test_a_model_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    job = parsed("--model", "./m").job
    assert with_absolute_paths(job).engine.model == str(tmp_path / "m")
    for name in ("default", "Qwen/Qwen2.5-0.5B"):
        assert with_absolute_paths(parsed("--model", name).job).engine.model == name


def test_a_profile_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    job = parsed("--engine", "simulated", "--profile", "p.json", "--no-cache").job
    assert with_profile_found(job).engine.profile == tmp_path / "p.json"
    assert with_profile_found(parsed().job) == parsed().job


def test_batch_sizes_and_continuous_batching_differ_in_nothing_else() -> None:
    config = batch_analysis.COMMAND.parse(["--batch-sizes", "8, 2", "--max-wait-ms", "50"])
    found = batch_analysis.variants(config, "x")
    assert [variant.name for variant in found] == ["batch_8", "batch_2", "continuous"]
    eight, two, continuous = (dict(flatten(variant.job)) for variant in found)
    assert [eight["batching"], two["batching"], continuous["batching"]] == ["micro", "micro", "continuous"]
    assert [eight["batch_size"], two["batch_size"]] == [8, 2]
    own = set(DECIDED) - {"bounded"}
    assert {name for name in eight if eight[name] != two[name]} == {"batch_size"} | own
    assert {name for name in eight if eight[name] != continuous[name]} == {"batching", "batch_size"} | own
    assert {eight["max_wait_ms"], two["max_wait_ms"]} == {50.0}
    alone = batch_analysis.variants(batch_analysis.COMMAND.parse(["--no-continuous", "--batch-sizes", "1"]), "x")
    assert [variant.name for variant in alone] == ["batch_1"]


def test_every_variant_is_a_job_that_the_pipeline_accepts() -> None:
    batches = batch_analysis.variants(batch_analysis.COMMAND.parse([]), "x")
    scaled = gpu_scaling.variants(gpu_scaling.COMMAND.parse([]), "x")
    parser = Parser()
    add_options(parser, JobConfig)
    for variant in (*batches, *scaled):
        assert from_options(JobConfig, parser.parse_args(to_options(variant.job))) == variant.job


def test_the_load_is_even_over_the_slots_of_every_parallelism() -> None:
    config = gpu_scaling.COMMAND.parse(["--parallelisms", "2,3,4"])
    assert [variant.job.parallelism for variant in gpu_scaling.variants(config, "x")] == [2, 3, 4]
    requests = list(make_workload(config.even_workload))
    for slots in (2, 3, 4):
        homes = Counter(default_slot(request.session_id, slots) for request in requests)
        assert set(homes.values()) == {len(requests) // slots}
    assert {(len(request.prompt_token_ids or ()), request.max_new_tokens) for request in requests} == {(64, 32)}
    given = gpu_scaling.COMMAND.parse(["--parallelisms", "7,11,13,17", "--even-over", "7"])
    assert given.even_workload.independent.even_over == 7


@pytest.mark.parametrize("value", ["", ",", "0", "-1", "1.5", "a", "1,,2", "9", "1,1", "01,1", "²"])
def test_a_list_of_numbers_is_whole_numbers_named_once(value: str) -> None:
    with pytest.raises(ValueError, match=r"whole number|named twice"):
        distinct_numbers(value, 8)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out: cannot write"):
        check_writable(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (batch_analysis.COMMAND, ["--batch-sizes", "0"], "--batch-sizes: '0' is not a whole number from 1 to 1024"),
        (batch_analysis.COMMAND, ["--batch-sizes", "a"], "--batch-sizes: 'a' is not a whole number"),
        (batch_analysis.COMMAND, ["--batch-sizes", "2,2"], "--batch-sizes: a number is named twice"),
        (batch_analysis.COMMAND, ["--batch-sizes", "4,16"], "--batch-sizes: 16 is above --max-running, 8; raise that"),
        (batch_analysis.COMMAND, ["--batch-size", "4"], "--batch-size: each row sets it; name the sizes with --batch-"),
        (batch_analysis.COMMAND, ["--batching", "micro"], "--batching: each row sets it"),
        (batch_analysis.COMMAND, ["--max-wait-ms", "-1"], "--max-wait-ms: "),
        (gpu_scaling.COMMAND, ["--parallelisms", "1,129"], "--parallelisms: '129' is not a whole number from 1 to 128"),
        (gpu_scaling.COMMAND, ["--parallelisms", "2,2"], "--parallelisms: a number is named twice"),
        (gpu_scaling.COMMAND, ["--parallelisms", "7,11,13,17"], "multiple, 17017, is above 1024"),
        (gpu_scaling.COMMAND, ["--parallelism", "2"], "--parallelism: each row sets it; name the numbers with --par"),
        (gpu_scaling.COMMAND, ["--engine", "simulated"], "profile is missing"),
        (gpu_scaling.COMMAND, ["--engine", "simulated", "--profile", "p", "--cache"], "to reuse"),
        (gpu_scaling.COMMAND, ["--profile", "p"], "--profile is only read where --engine is simulated"),
    ],
)
def test_what_an_experiment_cannot_be_made_of_is_named(command: Command[Any], arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        command.parse(arguments)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategies", "STATIC,LRU"], "--strategies: unknown strategy LRU; choose from STATIC, FLUID, FREQUENCY"),
        (["--strategies", "STATIC,static"], "--strategies: a strategy is named twice"),
        (["--eviction", "LRU,none"], "--eviction: unknown eviction policy NONE; choose from LRU"),
        (["--eviction", "LRU,lru"], "--eviction: an eviction policy is named twice; name each once"),
        (["--requests", "0"], "--requests: "),
        (["--budget-chunks", "9"], "--budget-chunks is below --min-capacity-chunks of all slots; raise "),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--strategy", "FLUID"], "--strategy: the experiment sets it"),
        (["--topic-prefix", "mine"], "--topic-prefix: each run makes its own topics"),
        (["--workload", "mooncake", "--trace", "/nonexistent.jsonl"], "/nonexistent.jsonl"),
        (["--workload", "mooncake"], "--trace"),
        (["--model", "/nonexistent/model"], "--model: no config.json in '/nonexistent/model'"),
        (["--out", "/dev/null/out"], "--out: cannot write to /dev/null/out"),
        (["--from-raw", "/nonexistent"], "--from-raw: /nonexistent is not a folder"),
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


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("batch_analysis", ["--batch-sizes", "a"], "--batch-sizes: 'a' is not a whole number"),
        ("batch_analysis", ["--prompt-tokens", "9999"], "--prompt-tokens: "),
        (
            "gpu_scaling",
            ["--engine", "simulated", "--profile", "/nonexistent"],
            "--profile: /nonexistent is not a file",
        ),
        ("gpu_scaling", ["--model", "/nonexistent/model"], "--model: no config.json"),
    ],
)
def test_every_experiment_refuses_before_it_starts_anything(
    tmp_path: Path, module: str, arguments: list[str], said: str
) -> None:
    where = ["--stack-dir", str(tmp_path / "stack"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", f"experiments.{module}", *where, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "stack").exists()


def test_security_of_a_kafka_that_would_be_started_is_refused(tmp_path: Path) -> None:
    secured = KafkaConfig(access=KafkaAccessConfig(kafka_security=KafkaSecurity.SASL_SSL))
    run = RunConfig(stack_dir=tmp_path)
    with (
        pytest.raises(UserError, match=r"^--kafka-security: needs your own Kafka"),
        services(run, JobConfig(kafka=secured)),
    ):
        pass
