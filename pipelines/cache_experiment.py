"""The cache experiment's job: micro-batches, and slots that a session never leaves, so that only caches differ.

Submit it with

    flink run -py pipelines/cache_experiment.py --brokers 127.0.0.1:9092 --redis-url redis://127.0.0.1:6379 \\
        --strategy FLUID --parallelism 2

Every option and its default: `python pipelines/cache_experiment.py --help`.
"""

from core.errors import exit_on_user_error
from operators.config import Batching, Placement
from pipelines.job import run

OWN_DEFAULTS = {"batching": Batching.MICRO, "placement": Placement.SESSION}


def main() -> None:
    run("cache_experiment.py", (__doc__ or "").splitlines()[0], OWN_DEFAULTS)


if __name__ == "__main__":
    exit_on_user_error(main)
