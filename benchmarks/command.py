"""The common part of every benchmark's command: measure, write the report, print it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import Report
from core.config import Config
from core.options import Parser, add_options, from_options, set_own_defaults
from experiments.interrupts import EXIT_STATUS, Interrupted, interruptible

C = TypeVar("C", bound=Config)


class Written(Protocol):
    """A configuration with the path of the report."""

    @property
    def out(self) -> Path: ...


W = TypeVar("W", bound=Written)


def stated(config: type[C], module: str, description: str, own_defaults: Mapping[str, Any] = {}) -> C:
    """Return the configuration of the command line. `own_defaults` replace defaults of options shared with others."""
    parser = Parser(f"python -m {module}", description=description)
    add_options(parser, config)
    set_own_defaults(parser, own_defaults)
    return from_options(config, parser.parse_args())


def carry_out(config: W, measure: Callable[[W, Console], Report], show: Callable[[Report, Console], Any]) -> Report:
    """Measure, write the report and print it. An interruption ends the process with its own status and no report."""
    console = Console()
    try:
        with interruptible():
            report = measure(config, console)
    except Interrupted:
        sys.exit(EXIT_STATUS)
    report.write(config.out)
    show(report, console)
    console.print(f"written to {config.out}")
    return report


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        yield bar
