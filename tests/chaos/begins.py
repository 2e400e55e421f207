"""Which requests the engines began, each time that one did: told by the slots themselves, to the last before a kill.

A slot's engine logs each begin at DEBUG, which is not shown otherwise; `--slot-logging` leads that into a file. A line
is written before its request is computed, and what is written outlives its writer.
"""

import json
import re
from pathlib import Path

BEGIN = re.compile(r"^DEBUG request '(.*)' begins$")


class BeginLog:
    """Lies in `folder`, which is made for it."""

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
        """In the order in which they were begun; one that was begun twice is there twice."""
        lines = self._file.read_text(errors="replace").splitlines() if self._file.exists() else []
        return [found[1] for line in lines if (found := BEGIN.match(line))]
