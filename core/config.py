"""What all configuration classes share. Each package defines its own, beside its code (`cache/config.py`, ...).

A configuration is frozen and is validated when it is made. Each default is written once, in its field. `core.options`
turns fields into command-line options of the same names: `max_wait_ms` is `--max-wait-ms`.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _on_every_host(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("is read on every host of the job; give the whole path, from / on")
    if not set(str(path)).isdisjoint(':{},"\\'):
        raise ValueError('has one of : { } , " \\ in its path, which Kafka would misread; choose another')
    return path


HostFile = Annotated[Path, AfterValidator(_on_every_host)]
"""The path of a file on each host of a job. The path is the same on all hosts; the content may differ."""
