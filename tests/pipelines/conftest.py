"""Fixtures: a tiny model, the cluster, and a run of the job in the module's `JOB`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen2Config

from experiments.flink_job import FlinkCluster
from local_stack import LocalStack, flink_cli
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny
from tests.pipelines.job_run import ROOT, Run


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("job") / "tiny-qwen2", Qwen2Config(**LAYERS_OF_TWO))


@pytest.fixture(scope="package")
def flink(stack: LocalStack) -> FlinkCluster:
    argv, env = flink_cli(stack)
    return FlinkCluster(stack.addresses().flink_rest_url, argv, env, ROOT)


@pytest.fixture
def run(stack: LocalStack, flink: FlinkCluster, model: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:80]
    made = Run(stack, flink, model, f"job-{name}", request.module.JOB)
    yield made
    made.close()
