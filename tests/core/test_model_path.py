"""A model that is meant by its path is looked for before anything is started."""

from pathlib import Path

import pytest

from core.config import EngineConfig, JobConfig
from core.errors import UserError
from core.model_path import with_model_found


def test_a_missing_model_is_told_before_the_start(tmp_path: Path) -> None:
    config = JobConfig(engine=EngineConfig(model=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"config\.json"):
        with_model_found(config)
