"""The log of requests that engines began, complete up to a kill.

A slot's engine logs each begin at DEBUG, and `--slot-logging` writes this to a file. A line is written before its
request is computed, and outlives the process.
"""

import json
import re
from pathlib import Path

BEGIN = re.compile(r"^DEBUG request '(.*)' begins$")


class BeginLog:
    """Create `folder` for the log."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.configuration = folder / "logging.json"
        self._file = folder / "begins.log"
        handler = {"class": "logging.FileHandler", "filename": str(self._file), "formatter": "line"}
        configuration = {
            "formatters": {"line": {"format": "%(levelname)s %(message)s"}},
            "handlers": {"begins": handler},
            "loggers": {"inference_service.continuous_engine": {"level": "DEBUG", "handlers": ["begins"]}},
        }
        self.configuration.write_text(json.dumps(configuration))

    def request_ids(self) -> list[str]:
        """Ids in the order of begins. A request that was begun twice is there twice."""
        lines = self._file.read_text(errors="replace").splitlines() if self._file.exists() else []
        return [found[1] for line in lines if (found := BEGIN.match(line))]
