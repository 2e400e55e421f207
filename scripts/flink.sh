#!/usr/bin/env bash
# Flink's command line for the local stack:  scripts/flink.sh run -d -py pipelines/inference.py [options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
exec "$root/.venv/bin/python" -m local_stack.flink_command "$@"
