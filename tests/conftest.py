"""What tests of several rooms share: one real Kafka, Redis and Flink for the whole run."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from local_stack import LocalStack, StackConfig

# The models are tiny and several processes share the cores: a second thread would mostly wait for a core, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a machine is busy with besides decides how long an example takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A running stack with four slots, on free ports. Topics and Redis keys are shared: use names of your own."""
    config = StackConfig.on_free_ports(
        tmp_path_factory.mktemp("stack"), task_managers=1, task_slots=4, task_manager_mb=1536
    )
    with LocalStack(config) as running:
        yield running
