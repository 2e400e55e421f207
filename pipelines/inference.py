"""The production job, with continuous batching: requests enter and leave the running batch at every step.

Submit it with

    flink run -py pipelines/inference.py --brokers 127.0.0.1:9092 --redis-url redis://127.0.0.1:6379 --parallelism 2

Every option and its default: `python pipelines/inference.py --help`.
"""

from core.errors import exit_on_user_error
from pipelines.job import run


def main() -> None:
    run("inference.py", (__doc__ or "").splitlines()[0], own_defaults={})


if __name__ == "__main__":
    exit_on_user_error(main)
