"""Command-line options of the configuration classes: the same names, defaults and checks, and a line per fault."""

import argparse
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.registry import SIZING
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.options import Parser, add_options, flatten, from_options, set_own_defaults, to_options
from inference_service.config import EngineConfig
from operators.config import Batching, BatchingConfig, JobConfig


def parse(arguments: list[str], config: type[BaseModel] = JobConfig) -> Any:
    parser = Parser(prog="job")
    add_options(parser, config)
    return from_options(config, parser.parse_args(arguments))


# The argparse of this Python drops a value that is just two dashes.
words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20).filter("--".__ne__)
names = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True).filter("--".__ne__)
addresses = st.from_regex(r"rediss?://[a-z0-9.-]{1,20}:[0-9]{1,4}/[0-9]", fullmatch=True)

configs = st.builds(
    JobConfig,
    job_name=words,
    parallelism=st.integers(1, 128),
    bounded=st.booleans(),
    checkpoint_interval_ms=st.integers(100, 10**9),
    engine=st.builds(
        EngineConfig,
        model=words,
        device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        max_running=st.integers(512, 1024),
    ),
    cache=st.builds(
        CacheConfig,
        cache=st.booleans(),
        chunk_tokens=st.integers(1, 4096),
        sizing=st.builds(
            SizingConfig,
            strategy=st.sampled_from(list(SIZING)),
            min_capacity_chunks=st.integers(0, 10),
            max_capacity_chunks=st.integers(10, 1000),
            fluid_history_weight=st.floats(0, 1, exclude_max=True),
            fluid_window_ms=st.floats(1e-300, 1e300),
        ),
        remote=st.builds(RemoteConfig, redis_url=st.none() | addresses, redis_namespace=names),
    ),
    batching=st.builds(BatchingConfig, batch_size=st.integers(1, 512), max_wait_ms=st.floats(0, 3_600_000)),
    kafka=st.builds(KafkaConfig, brokers=words, topic_prefix=names, consumer_group=words),
)


@given(config=configs)
def test_a_configuration_survives_the_command_line(config: JobConfig) -> None:
    assert parse(to_options(config)) == config


def test_nothing_given_is_the_default() -> None:
    assert parse([]) == JobConfig()


def test_a_command_may_differ_in_its_defaults_and_still_be_told_everything() -> None:
    parser = Parser(prog="job")
    add_options(parser, JobConfig)
    set_own_defaults(parser, {"batching": Batching.MICRO})
    assert from_options(JobConfig, parser.parse_args([])).batching.batching is Batching.MICRO
    assert "(default: micro)" in " ".join(parser.format_help().split())
    # The full help text is the same for every command.
    assert from_options(JobConfig, parser.parse_args(to_options(JobConfig()))) == JobConfig()


def test_an_option_reaches_its_nested_field() -> None:
    config = parse(["--chunk-tokens", "64", "--strategy=FLUID", "--no-cache", "--max-wait-ms", "7.5"])
    assert config.cache.chunk_tokens == 64
    assert config.cache.sizing.strategy == "FLUID"
    assert config.cache.cache is False
    assert config.batching.max_wait_ms == 7.5


def test_a_value_may_begin_with_a_dash() -> None:
    config = JobConfig(job_name="--bounded", kafka=KafkaConfig(consumer_group="-x y"))
    assert parse(to_options(config)) == config


def test_no_two_fields_share_an_option() -> None:
    counted = Counter(name for name, _ in flatten(JobConfig()))
    assert [name for name, count in counted.items() if count > 1] == []


def test_the_help_tells_every_option_and_its_default() -> None:
    parser = Parser(prog="job")
    add_options(parser, JobConfig)
    # argparse may break a line within a word, after a hyphen.
    text = "".join(parser.format_help().split())
    for name, value in flatten(JobConfig()):
        assert f"--{name.replace('_', '-')}" in text
        assert f"(default:{'none' if value is None else value})" in text


def test_the_help_may_speak_of_percent() -> None:
    class Load(BaseModel):
        """The load of a benchmark."""

        rate: int = Field(default=1, description="requests at 10 % load (few)")

    parser = Parser(prog="job")
    add_options(parser, Load)
    assert "requests at 10 % load (few) (default: 1)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--parallelism", "0"], "--parallelism: "),
        (["--parallelism", "two"], "--parallelism: "),
        (["--chunk-tokens", "5000"], "--chunk-tokens: "),
        (["--strategy", "BEST"], "--strategy: "),
        (["--device", "gpu"], "--device: "),
        (["--max-wait-ms", "nan"], "--max-wait-ms: "),
        (["--fluid-window-ms", "inf"], "--fluid-window-ms: "),
        (["--redis-url", "redis://h:6379/x"], "--redis-url: names the database 'x', which is no number; "),
        (["--redis-url", "rediss://h:6379/1/2"], "--redis-url: names the database '1/2', which is no number; "),
        (["--redis-namespace", "a b"], "--redis-namespace: "),
        (["--model="], "--model: "),
        (["--slot-restarts", "2"], "--slot-restarts is not above --max-attempts: "),
        (["--max-attempts", "5"], "--slot-restarts is not above --max-attempts: "),
    ],
)
def test_a_bad_value_is_refused_under_the_name_that_was_typed(arguments: list[str], option: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert str(caught.value).startswith(option)
    assert "\n" not in str(caught.value)


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse(["--parallelism", "0", "--batch-size", "0"])
    assert "--parallelism: " in str(caught.value)
    assert "; --batch-size: " in str(caught.value)


@pytest.mark.parametrize("config", [JobConfig, CacheConfig, SizingConfig])
def test_a_fault_of_two_fields_together_names_both_options(config: type[BaseModel]) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--min-capacity-chunks", "9", "--max-capacity-chunks", "3"], config)
    assert str(caught.value) == "--min-capacity-chunks is above --max-capacity-chunks; swap them"


@pytest.mark.parametrize("arguments", [["--nonsense", "1"], ["--chunk-tokens"], ["stray"]])
def test_a_bad_command_line_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert written.err.startswith("error: ")
    assert written.err.endswith("; see job --help\n")
    assert arguments[0] in written.err


def test_options_that_were_not_declared_here_are_left_alone() -> None:
    options = argparse.Namespace(command="run", batch_size="7")
    assert from_options(BatchingConfig, options) == BatchingConfig(batch_size=7)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--engine", "simulated", "--no-cache"],
            "--profile is missing; name the file that benchmarks/engine.py wrote",
        ),
        (["--profile", "p.json"], "--profile is only read where --engine is simulated; leave it out, or add that"),
        (
            ["--engine", "simulated", "--profile", "p.json"],
            "--cache has nothing to reuse where --engine is simulated; add --no-cache",
        ),
    ],
)
def test_a_simulated_device_needs_a_profile_and_has_no_cache(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert str(caught.value) == told


class Grid(BaseModel):
    """Runs one job per value."""

    dtype: str = "float32,bfloat16"
    job: JobConfig = JobConfig()


def test_a_field_stands_in_for_those_of_its_name_within() -> None:
    config = parse(["--dtype", "a,b", "--model", "m"], Grid)
    assert (config.dtype, config.job.engine.dtype, config.job.engine.model) == ("a,b", "auto", "m")
