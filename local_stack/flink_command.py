"""Flink's command line for the local stack: `python -m local_stack.flink_command run -py JOB.py ...`."""

import os
import sys

from core.errors import UserError, exit_on_user_error
from local_stack import LocalStack, StackConfig, flink_cli


def main() -> None:
    """Replace this process by `flink` with the given arguments. Raises `UserError` if no local stack runs."""
    stack = LocalStack.running_in(StackConfig().dir)
    if stack is None:
        raise UserError("no local stack is running; start it with scripts/cluster.sh start")
    argv, env = flink_cli(stack)
    os.execvpe(argv[0], [*argv, *sys.argv[1:]], env)


if __name__ == "__main__":
    exit_on_user_error(main)
