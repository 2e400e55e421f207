"""A job's configuration before submission: its paths, and the cost of importing a job's description."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import UserError
from inference_service.config import EngineConfig
from operators.config import JobConfig
from operators.job_files import with_absolute_paths


def test_a_missing_model_is_told_before_the_start(tmp_path: Path) -> None:
    config = JobConfig(engine=EngineConfig(model=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"config\.json"):
        with_absolute_paths(config)


def test_describing_a_job_loads_no_library_that_computes_or_connects() -> None:
    script = "import sys, operators.job_files; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert "pydantic" in loaded
    assert set(loaded).isdisjoint({"torch", "numpy", "transformers", "redis", "kafka", "pyflink"})
